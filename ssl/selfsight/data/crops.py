"""Where crops are taken, and how they are brought to size.

The boxes follow torchvision's RandomResizedCrop exactly (Szegedy et al. 2015, "Going deeper with
convolutions"): area uniform, log aspect ratio uniform, ten tries, then the central crop of an
allowed ratio. The resize is torch's antialiased uint8 kernel, which agrees with Pillow to 0.04/255
in the mean and works in channels-last memory without a copy.
"""

from __future__ import annotations

from math import exp, floor, log, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

TRIES = 10
BOX_DRAWS = 2 * TRIES + 2  # an area and a ratio a try, then top and left

Interpolation = Literal["bilinear", "bicubic"]

# What torch.nn.functional.interpolate(antialias=True) calls; the overloads with `out` write into
# the memory of the batch, and this entry costs half of what the same operator costs by torch.ops.
_RESIZE = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,  # pyright: ignore[reportAttributeAccessIssue]
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,  # pyright: ignore[reportAttributeAccessIssue]
}


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    draws: list[float],
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A random crop of a `width` x `height` image from BOX_DRAWS uniform numbers.

    `scale` is the range of its share of the area, `ratio` of its width over its height.
    """
    area = width * height
    low, high = log(ratio[0]), log(ratio[1])
    for n in range(TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * draws[2 * n])
        aspect = exp(low + (high - low) * draws[2 * n + 1])
        w, h = round(sqrt(target * aspect)), round(sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = floor(draws[2 * TRIES] * (height - h + 1))
            left = floor(draws[2 * TRIES + 1] * (width - w + 1))
            return Box(top, left, h, w)
    whole = width / height
    if whole < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif whole > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    # Images of one pixel in width or height: torchvision would round a side to more than there is.
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def planes(pixels: np.ndarray) -> Tensor:
    """The same memory, (..., H, W, C), as a tensor (..., C, H, W)."""
    return torch.from_numpy(pixels).movedim(-1, -3)


def resize(
    source: Tensor, box: Box, target: Tensor, interpolation: Interpolation = "bilinear"
) -> None:
    """Resize the `box` of `source` (1, C, H, W) into `target` (1, C, h, w), antialiased.

    Both are uint8, or both uint16: torch has no kernel for these, so they go through float32, which
    holds them exactly, and are rounded.
    """
    top, left, h, w = box
    crop = source[:, :, top : top + h, left : left + w]
    if crop.dtype == torch.uint8:
        _RESIZE[interpolation](crop, target.shape[2:], False, None, None, out=target)
        return
    resized = _RESIZE[interpolation](crop.float(), target.shape[2:], False, None, None)
    target.copy_(resized.round_().clamp_(0, 65535))


def evaluation_geometry(
    width: int, height: int, size: int, shorter: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size (height, width) to resize an image to, and (top, left) of its central crop.

    The shorter side becomes `shorter`, but is never enlarged beyond the `size` that the crop needs.
    """
    short = min(width, height)
    target = shorter if short >= shorter else max(short, size)
    new_height, new_width = round(height * target / short), round(width * target / short)
    return (new_height, new_width), ((new_height - size) // 2, (new_width - size) // 2)
