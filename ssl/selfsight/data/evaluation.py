"""Images for evaluation: no randomness, one size, no augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from selfsight.data import crops
from selfsight.data.decode import MAX_PIXELS, DecodeError, Encoded
from selfsight.data.ledger import Failure
from selfsight.data.sources.source import Source


def read_images(
    source: Source,
    indices: Sequence[int],
    *,
    size: int,
    resize: int | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, Tensor, list[Failure]]:
    """Read the samples `indices` of a source, resized and centrally cropped to `size` pixels.

    The shorter side is resized (antialiased bilinear) to `resize`, by default size * 256 / 224
    as is usual on ImageNet, and the central square is taken. An image whose shorter side is below
    that is enlarged no further than the square needs: 32-pixel images at size 32 are left as they
    are. `workers` threads decode side by side; the result does not depend on their number.

    Returns:
        uint8 (n, 3, size, size), int64 labels (n,) with -1 for none, and the samples that could not
        be used and are left out (`position` is the index in the source).
    """
    shorter = round(size * 256 / 224) if resize is None else resize
    if shorter < size:
        raise ValueError(f"evaluation cannot crop {size} pixels from images resized to {shorter}.")

    def one(index: int) -> tuple[np.ndarray, int] | Failure:
        key = None
        try:
            record = source.read(index)
            key, pixels = record.key, record.data
            if isinstance(pixels, bytes):
                pixels = Encoded(pixels, max_pixels).decode()
        except (DecodeError, OSError) as error:
            reason = str(error) or type(error).__name__
            return Failure(source.name, source.key(index) if key is None else key, reason, index)
        image = central_square(pixels, size, shorter)
        return image, -1 if record.label is None else record.label

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(one, map(int, indices)))
    else:
        results = [one(int(index)) for index in indices]
    good = [result for result in results if not isinstance(result, Failure)]
    images = torch.empty(len(good), 3, size, size, dtype=torch.uint8)
    for target, (image, _) in zip(images, good, strict=True):
        target.copy_(torch.from_numpy(image).permute(2, 0, 1))
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [result for result in results if isinstance(result, Failure)]


def central_square(pixels: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """Resize the shorter side of uint8 pixels (H, W, 3) and crop the central square (s, s, 3)."""
    height, width = pixels.shape[:2]
    resized, (top, left) = crops.evaluation_geometry(width, height, size, shorter)
    if resized != (height, width):
        out = np.empty((*resized, 3), np.uint8)
        box = crops.Box(0, 0, height, width)
        crops.resize(crops.planes(pixels[None]), box, crops.planes(out[None]))
        pixels = out
    return pixels[top : top + size, left : left + size]
