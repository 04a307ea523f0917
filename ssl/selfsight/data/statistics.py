"""Mean and standard deviation of each channel, estimated from a sample of a source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfsight.data.crops import Box, planes, resize
from selfsight.data.decode import DecodeLimits
from selfsight.data.evaluation import read_pixels
from selfsight.data.ledger import Failure
from selfsight.data.pixels import RGB, PixelFormat
from selfsight.data.sources.source import Source


@dataclass(frozen=True)
class PixelStatistics:
    """What a sample of a source looks like.

    Attributes:
        mean, std: of each channel, values in [0, 1]. Every image counts the same, however large.
        images: used for them.
        failures: those that could not be used; `position` is the index in the sample.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    failures: list[Failure]


def pixel_statistics(
    source: Source,
    images: int = 1000,
    *,
    size: int = 224,
    limits: DecodeLimits | None = None,
    pixels: PixelFormat = RGB,
) -> PixelStatistics:
    """Estimate the channels' mean and standard deviation from `images` of a source.

    The sample is the source's evenly spread excerpt, so the result is always the same. Of each
    image the central square is taken, and made smaller (antialiased bilinear) to `size` pixels if
    it is larger.

    Raises:
        ValueError: the source has no images, or none of those looked at can be used.
    """
    sample = source.excerpt(images)
    total = np.zeros(pixels.channels)
    squares = np.zeros(pixels.channels)
    used, failures = 0, []
    for index in range(len(sample)):
        found = read_pixels(sample, index, limits, pixels)
        if isinstance(found, Failure):
            failures.append(found._replace(source=source.name))
            continue
        values = _square(found[0], size).reshape(-1, pixels.channels) / pixels.top
        total += values.mean(axis=0)
        squares += (values * values).mean(axis=0)
        used += 1
    if not used:
        why = f", the last of them {failures[-1].key} ({failures[-1].reason})" if failures else ""
        raise ValueError(
            f"the statistics of {source.name} cannot be estimated: none of {len(sample)} images "
            f"can be used{why}."
        )
    mean = total / used
    std = np.sqrt(np.maximum(squares / used - mean * mean, 0))
    return PixelStatistics(tuple(mean.tolist()), tuple(std.tolist()), used, failures)


def _square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The central square of pixels (H, W, C), at most `size` pixels wide."""
    height, width, channels = pixels.shape
    side = min(height, width)
    box = Box((height - side) // 2, (width - side) // 2, side, side)
    if side <= size:
        return pixels[box.top : box.top + side, box.left : box.left + side]
    out = np.empty((size, size, channels), pixels.dtype)
    resize(planes(pixels[None]), box, planes(out[None]))
    return out
