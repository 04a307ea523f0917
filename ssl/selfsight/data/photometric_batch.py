"""Colour, grey, blur and solarisation of a whole batch of uint8 crops, on any torch device.

The operations of `photometric`, one by one, with the integers of OpenCV and its rounding to whole
levels after each of them, so that a crop comes out the same wherever this is done: on processors
with fused multiply-add all but one value in some millions is equal to OpenCV's. What becomes of a
crop does not depend on the other crops of its batch.

A worker crops, resizes and flips, and packs what is left to do into a row of numbers a view
(`pack`); `apply` does it. Which crops take part in which operation is read from the rows on the
host, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsight.data.multicrop import View

# A row: the order of the jitter, three factors and the hue in steps, sigma of the blur, and grey
# and solarisation as bits. In the precision in which the factors were drawn: one more rounding
# would put some values one level off.
COLUMNS = 7
DTYPE = np.dtype(np.float64)
_ORDER, _FACTORS, _SIGMA, _FLAGS = 0, 1, 5, 6
_GRAY, _SOLARIZE = 1, 2
_OPERATIONS = 4  # of the jitter

CHUNK_BYTES = 32 << 20

# In float32, as OpenCV has them. It rounds where Pillow cuts: half a level less, as in photometric.
_CUT = float(np.float32(-0.499))
_LEVEL = float(np.float32(1 / 255))


def pack(views: Sequence[View]) -> np.ndarray:
    """What is left to do to the views of one image after crop, resize and flip: (views, COLUMNS).

    The order of the jitter is written in base 5: digit i is 1 + the operation of slot i, or 0.
    """
    table = np.zeros((len(views), COLUMNS), DTYPE)
    for row, view in zip(table, views, strict=True):
        for slot, (operation, factor) in enumerate(view.jitter):
            row[_ORDER] += (operation + 1) * 5**slot
            # The hue is turned by whole steps of 1/256 of a circle.
            row[_FACTORS + operation] = int(factor * 255) & 255 if operation == 3 else factor
        row[_SIGMA] = view.blur
        row[_FLAGS] = _GRAY * view.gray + _SOLARIZE * view.solarize
    return table


def apply(crops: Tensor, table: np.ndarray | Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Do what `table` says to `crops`, in place.

    Args:
        crops: uint8 (count, b, 3, height, width) or (n, 3, height, width) on any device, best in
            channels-last memory. On CUDA the work is queued on the current stream.
        table: rows of `pack`, (count, b, COLUMNS) or (n, COLUMNS), on the host; no longer needed
            on return.
        chunk_bytes: crops are taken in chunks of so many bytes as float32, but at least one crop;
            the memory used besides the crops is up to nine times that.

    Returns:
        `crops`.

    Raises:
        ValueError: other shapes or types.
    """
    rows = np.asarray(table, np.float64)
    if crops.dtype != torch.uint8 or crops.dim() not in (4, 5) or crops.shape[-3] != 3:
        raise ValueError(
            "colour on the device needs uint8 crops (count, images, 3, height, width), not "
            f"{crops.dtype} {tuple(crops.shape)}."
        )
    if rows.shape != (*crops.shape[:-3], COLUMNS):
        raise ValueError(
            f"crops of shape {tuple(crops.shape)} need a table of shape "
            f"{(*crops.shape[:-3], COLUMNS)}, not {rows.shape}."
        )
    if crops.dim() == 5:
        if crops.stride(0) == crops.shape[1] * crops.stride(1):
            apply(crops.flatten(0, 1), rows.reshape(-1, COLUMNS), chunk_bytes)
        else:  # a part of a batch: its views do not follow each other in memory
            for view, view_rows in zip(crops, rows, strict=True):
                apply(view, view_rows, chunk_bytes)
        return crops
    places = np.flatnonzero((rows[:, _ORDER] > 0) | (rows[:, _SIGMA] > 0) | (rows[:, _FLAGS] > 0))
    each = max(1, chunk_bytes // (4 * 3 * crops.shape[-2] * crops.shape[-1]))
    for start in range(0, len(places), each):
        chunk = places[start : start + each]
        _work(crops, chunk, _steps(rows[chunk]))
    return crops


class _Step(NamedTuple):
    """One operation on some crops of a chunk."""

    operation: Callable[[Tensor, Tensor], Tensor]
    members: np.ndarray  # int64, numbers within the chunk
    parameters: np.ndarray  # (members, any)


def _steps(rows: np.ndarray) -> list[_Step]:
    """What the rows of a chunk ask for, in order, a step for all crops that share it."""
    order = rows[:, _ORDER].astype(np.int64)
    flags, sigmas = rows[:, _FLAGS].astype(np.int64), rows[:, _SIGMA]
    factors = rows[:, _FACTORS : _FACTORS + _OPERATIONS]
    steps: list[_Step] = []
    for slot in range(_OPERATIONS):
        digit = order // 5**slot % 5
        for number, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
            members = np.flatnonzero(digit == number + 1)
            steps.append(_Step(operation, members, factors[members, number, None]))
    for operation, chosen in ((_gray, flags & _GRAY), (_blur, sigmas), (_solarize, flags >> 1)):
        members = np.flatnonzero(chosen)
        parameters = _kernels(sigmas[members]) if operation is _blur else np.empty((0, 0))
        steps.append(_Step(operation, members, parameters))
    return [step for step in steps if len(step.members)]


def _work(crops: Tensor, places: np.ndarray, steps: list[_Step]) -> None:
    """Do `steps` to the crops at `places`, as float32 (n, 3, height, width) in whole levels."""
    device = crops.device
    where, *members = _send([places, *(step.members for step in steps)], device)
    # Sums and thresholds of a crop in the precision of OpenCV; Apple's GPUs have float32 only.
    wide = np.float32 if device.type == "mps" else np.float64
    parameters = _send([step.parameters.astype(wide) for step in steps], device)
    pixels = crops.index_select(0, where).to(torch.float32, memory_format=torch.contiguous_format)
    for step, own, values in zip(steps, members, parameters, strict=True):
        part = step.operation(pixels.index_select(0, own), values)
        pixels.index_copy_(0, own, part)
    crops.index_copy_(0, where, pixels.to(torch.uint8))


def _send(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on `device`, by one copy, for which the host does not wait."""
    together = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


# ---------------------------------------------------------------- the operations
#
# Each takes float32 (n, 3, height, width) of whole levels, which it may overwrite, and a row of
# parameters a crop. Whole numbers below 2^24 are exact in float32 in any order of summation.


def _levels(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255)


def _fused(a: Tensor, b: Tensor, c: Tensor | float, wide: torch.dtype) -> Tensor:
    """a * b + c in float32, rounded once, as OpenCV has it where the processor can."""
    return a.to(wide).mul_(b).add_(c).to(torch.float32)


def _each(column: Tensor) -> Tensor:
    """One number a crop, to be broadcast over its pixels."""
    return column.to(torch.float32).view(-1, 1, 1, 1)


def _luma(pixels: Tensor) -> Tensor:
    """Grey (n, 1, height, width) by ITU-R 601, in OpenCV's fixed point of 15 bits."""
    red, green, blue = pixels.split(1, dim=1)
    weighted = (red * 9798.0).add_(green * 19235.0).add_(blue * 3735.0)
    return weighted.add_(16384.0).mul_(1 / 32768).floor_()


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _levels(_fused(pixels, _each(factor), _CUT, factor.dtype))


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    total = _luma(pixels).sum((1, 2, 3), dtype=torch.int64).to(factor.dtype)
    mean = (total * (1 / (pixels.shape[2] * pixels.shape[3])) + 0.5).floor_()
    shift = mean * (1 - factor[:, 0]) - 0.499
    return _levels(_fused(pixels, _each(factor), _each(shift), factor.dtype))


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    grey = _fused(_luma(pixels), _each(1 - factor), _CUT, factor.dtype)
    return _levels(_fused(pixels, _each(factor), grey, factor.dtype))


def _hue(pixels: Tensor, steps: Tensor) -> Tensor:
    """To HSV of 8 bits and back as OpenCV does it: 256 hues, turned by `steps` of them."""
    red, green, blue = pixels.split(1, dim=1)
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    spread = value - least
    # OpenCV's tables of reciprocals have 12 bits after the point.
    inverse = (1044480 / value.clamp(min=1)).round_()
    saturation = inverse.mul_(spread).add_(2048).mul_(1 / 4096).floor_()
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(
            value == green,
            (blue - red).add_(spread, alpha=2),
            (red - green).add_(spread, alpha=4),
        ),
    )
    inverse = (174762.66666666666 / spread.clamp(min=1)).round_()
    hue = hue.mul_(inverse).add_(2048).mul_(1 / 4096).floor_()
    hue = torch.where(hue < 0, hue + 256, hue).clamp_(max=255).add_(_each(steps))
    hue = torch.where(hue >= 256, hue - 256, hue)
    # Back: a circle has 255 hues here. Red, green and blue are value * (1 - saturation * m), where
    # over the six sectors m rises (at 0), stays 1, falls (at 3) and stays 0, each from its own.
    hue.mul_(float(np.float32(6) * np.float32(_LEVEL)))
    sector = hue.floor()
    rising = hue.sub_(sector)
    falling = 1 - rising
    first = torch.arange(5.0, 0.0, -2.0, device=pixels.device)
    sector = sector + first.view(1, 3, 1, 1)
    sector = torch.where(sector >= 6, sector.sub(6), sector)
    m = torch.minimum(sector + rising, (3 - sector).add_(falling)).clamp_(0, 1)
    part = m.mul_(saturation.mul_(_LEVEL)).neg_().add_(1)
    return _levels(part.mul_(value.mul_(_LEVEL)).mul_(255))


def _gray(pixels: Tensor, _: Tensor) -> Tensor:
    return _luma(pixels).expand_as(pixels)


def _solarize(pixels: Tensor, _: Tensor) -> Tensor:
    return torch.where(pixels < 128, pixels, 255 - pixels)


def _blur(pixels: Tensor, kernels: Tensor) -> Tensor:
    """Along the rows, then along the columns, mirrored at the borders without doubling the edge.

    Weights are whole numbers of 1/256, so all sums are exact; a shorter kernel among longer ones
    has zeros at its ends.
    """
    radius = kernels.shape[1] // 2
    for dim in (3, 2):
        size = pixels.shape[dim]
        period = max(1, 2 * (size - 1))
        places = np.abs((np.arange(-radius, size + radius) + size - 1) % period - (size - 1))
        (index,) = _send([places], pixels.device)
        padded = pixels.index_select(dim, index)
        pixels = padded.narrow(dim, radius, size) * _each(kernels[:, radius])
        for tap in range(2 * radius + 1):
            if tap != radius:
                pixels.addcmul_(padded.narrow(dim, tap, size), _each(kernels[:, tap]))
    return pixels.add_(32768).mul_(1 / 65536).floor_()


def _kernels(sigmas: np.ndarray) -> np.ndarray:
    """Gaussian weights cut at 3 sigma, whole numbers of sum 256: (n, 2 * largest radius + 1).

    OpenCV's: the rounding error of each weight is carried to the next one inwards, the middle one
    takes what is left.
    """
    radii = np.ceil(3 * sigmas).astype(np.int64)
    most = int(radii.max(initial=0))
    kernels = np.zeros((len(sigmas), 2 * most + 1))
    for radius in np.unique(radii):
        own = np.flatnonzero(radii == radius)
        distances = np.arange(-radius, 0.0)
        weights = np.exp(-0.5 * distances**2 / sigmas[own, None] ** 2)
        weights *= 256 / (2 * weights.sum(1, keepdims=True) + 1)
        carried = np.zeros(len(own))
        for n in range(radius):
            exact = weights[:, n] + carried
            rounded = np.rint(exact)
            carried = exact - rounded
            kernels[own, most - radius + n] = kernels[own, most + radius - n] = rounded
        kernels[own, most] = 256 - kernels[own].sum(1)
    return kernels
