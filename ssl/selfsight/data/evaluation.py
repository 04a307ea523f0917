"""Images for evaluation: no randomness, one size, no augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from selfsight.data import crops
from selfsight.data.decode import DecodeError, DecodeLimits, Encoded
from selfsight.data.ledger import Failure
from selfsight.data.pixels import RGB, PixelFormat, from_array
from selfsight.data.sources.source import Source

_LONGEST = 4  # sides of a strip, of whose length only so many times the width is resized


def read_images(
    source: Source,
    indices: Sequence[int],
    *,
    size: int,
    resize: int | None = None,
    workers: int = 0,
    limits: DecodeLimits | None = None,
    pixels: PixelFormat = RGB,
) -> tuple[Tensor, Tensor, list[Failure]]:
    """Read the samples `indices` of a source, resized and centrally cropped to `size` pixels.

    The shorter side is resized (antialiased bilinear) to `resize`, by default size * 256 / 224
    as is usual on ImageNet, and the central square is taken. An image whose shorter side is below
    that is enlarged no further than the square needs: 32-pixel images at size 32 are left as they
    are. `workers` threads decode side by side; the result does not depend on their number.

    Returns:
        uint8 or uint16 (n, C, size, size) by the format of `pixels`, int64 labels (n,) with -1 for
        none, and the samples that could not be used and are left out (`position` is the index in
        the source).
    """
    shorter = round(size * 256 / 224) if resize is None else resize
    if shorter < size:
        raise ValueError(f"evaluation cannot crop {size} pixels from images resized to {shorter}.")

    def one(index: int) -> tuple[np.ndarray, int] | Failure:
        found = read_pixels(source, index, limits, pixels)
        if isinstance(found, Failure):
            return found
        image, label = found
        return central_square(image, size, shorter), -1 if label is None else label

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(one, map(int, indices)))
    else:
        results = [one(int(index)) for index in indices]
    good = [result for result in results if not isinstance(result, Failure)]
    dtype = torch.uint8 if pixels.bits == 8 else torch.uint16
    images = torch.empty(len(good), pixels.channels, size, size, dtype=dtype)
    for target, (image, _) in zip(images, good, strict=True):
        target.copy_(torch.from_numpy(image).permute(2, 0, 1))
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [result for result in results if isinstance(result, Failure)]


def read_pixels(
    source: Source, index: int, limits: DecodeLimits | None, pixels: PixelFormat
) -> tuple[np.ndarray, int | None] | Failure:
    """Pixels (H, W, C) and label of a sample, or why it cannot be used."""
    key = None
    try:
        record = source.read(index)
        key, data = record.key, record.data
        if isinstance(data, bytes):
            return Encoded(data, limits, pixels).decode(), record.label
        return from_array(data, pixels), record.label
    except (DecodeError, OSError) as error:
        reason = str(error) or type(error).__name__
        return Failure(source.name, source.key(index) if key is None else key, reason, index)


def central_square(pixels: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """Resize the shorter side of pixels (H, W, C) and crop the central square (s, s, C)."""
    short = min(pixels.shape[:2])
    if max(pixels.shape[:2]) > _LONGEST * short:
        # Of a strip of 1x65535 pixels, resized as a whole, gigabytes would be made.
        top, left = (max(0, side - _LONGEST * short) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + _LONGEST * short, left : left + _LONGEST * short]
    height, width, channels = pixels.shape
    resized, (top, left) = crops.evaluation_geometry(width, height, size, shorter)
    if resized != (height, width):
        out = np.empty((*resized, channels), pixels.dtype)
        box = crops.Box(0, 0, height, width)
        crops.resize(crops.planes(pixels[None]), box, crops.planes(out[None]))
        pixels = out
    return pixels[top : top + size, left : left + size]
