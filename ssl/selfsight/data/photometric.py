"""Colour, grey, blur and solarisation of one uint8 crop, operation by operation, with OpenCV.

Each operation is that of torchvision on Pillow images (what SwAV and DINO were trained with), and
clamps to [0, 255] like it: fusing brightness, contrast and saturation into one matrix loses the
clamps and is off by 4.6/255 in the mean, and a hue rotation in YIQ by 5.5/255. Blur is a true
Gaussian, where Pillow's is three box filters. All functions work in place on contiguous uint8 RGB
(height, width, 3).

`operations` gives those of another format (any number of channels, uint16): the same definitions,
with white at 65535, and the mean over all channels where there is no colour to take the grey of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np

from selfsight.data.pixels import PixelFormat, luma

_SOLARIZE = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)

# OpenCV rounds and Pillow cuts: half a level less, but short of turning n.0 into n - 1.
_CUT = -0.499


def brightness(pixels: np.ndarray, factor: float) -> None:
    """Scale all values: 0 is black, 1 leaves the image."""
    cv2.convertScaleAbs(pixels, dst=pixels, alpha=factor, beta=_CUT)


def contrast(pixels: np.ndarray, factor: float) -> None:
    """Scale the distance to the mean grey of the image."""
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    # One image with weight 0: the cheapest affine function of OpenCV that clamps below 0.
    cv2.addWeighted(pixels, factor, pixels, 0, mean * (1 - factor) + _CUT, dst=pixels)


def saturation(pixels: np.ndarray, factor: float) -> None:
    """Scale the distance to the grey of each pixel."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    cv2.addWeighted(pixels, factor, grey, 1 - factor, _CUT, dst=pixels)


def hue(pixels: np.ndarray, shift: float) -> None:
    """Turn the hue by `shift` of a full circle, in HSV."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    angles = hsv.reshape(-1)[::3]
    np.add(angles, np.uint8(int(shift * 255) & 255), out=angles)  # wraps, as a circle does
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=pixels)


def gray(pixels: np.ndarray) -> None:
    """Replace each pixel by its luma (ITU-R 601), in three equal channels."""
    cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, dst=pixels)


def blur(pixels: np.ndarray, sigma: float) -> None:
    """Gaussian blur, `sigma` in pixels, cut at 3 sigma, the image mirrored at its borders."""
    width = 2 * ceil(3 * sigma) + 1
    cv2.GaussianBlur(pixels, (width, width), sigma, dst=pixels, borderType=cv2.BORDER_REFLECT_101)


def solarize(pixels: np.ndarray) -> None:
    """Invert all values of at least 128."""
    cv2.LUT(pixels, _SOLARIZE, dst=pixels)


def flip(pixels: np.ndarray) -> None:
    """Mirror left and right."""
    cv2.flip(pixels, 1, dst=pixels)


# In the order of the strengths of a colour jitter.
JITTER = (brightness, contrast, saturation, hue)


class Operations(NamedTuple):
    """What is done to a crop, each in place; `jitter` takes a factor, `blur` its sigma."""

    jitter: tuple[Callable[[np.ndarray, float], None], ...]
    gray: Callable[[np.ndarray], None]
    blur: Callable[[np.ndarray, float], None]
    solarize: Callable[[np.ndarray], None]
    flip: Callable[[np.ndarray], None]


def operations(form: PixelFormat) -> Operations:
    """The operations on crops (height, width, C) of that format.

    Without colour (C is not 3), saturation, hue and grey raise TypeError: a configuration that asks
    for them is refused before.
    """
    if (form.channels, form.bits) == (3, 8):
        return Operations(JITTER, gray, blur, solarize, flip)
    colours: tuple[Callable[[np.ndarray, float], None], ...] = (_no_colour, _no_colour)
    if form.bits == 8:
        jitter = (brightness, _contrast_of_many, *colours)
        return Operations(jitter, _no_colour, blur, solarize, flip)
    if form.channels == 3:
        colours = (_saturation_deep, _hue_deep)
    jitter = (_brightness_deep, partial(_contrast_deep, colour=form.channels == 3), *colours)
    grey = _gray_deep if form.channels == 3 else _no_colour
    return Operations(jitter, grey, blur, _solarize_deep, flip)


def _no_colour(pixels: np.ndarray, factor: float = 0.0) -> None:
    raise TypeError(f"images of {pixels.shape[2]} channels have no colour to change.")


def _contrast_of_many(pixels: np.ndarray, factor: float) -> None:
    mean = int(pixels.mean() + 0.5)
    cv2.addWeighted(pixels, factor, pixels, 0, mean * (1 - factor) + _CUT, dst=pixels)


def _store_deep(pixels: np.ndarray, values: np.ndarray) -> None:
    """Float values into uint16 pixels, clamped and rounded."""
    np.clip(values, 0, 65535, out=values)
    pixels[...] = np.rint(values, out=values)


def _brightness_deep(pixels: np.ndarray, factor: float) -> None:
    _store_deep(pixels, pixels * np.float32(factor))


def _contrast_deep(pixels: np.ndarray, factor: float, colour: bool) -> None:
    mean = float((luma(pixels) if colour else pixels).mean())
    _store_deep(pixels, pixels * np.float32(factor) + np.float32(mean * (1 - factor)))


def _saturation_deep(pixels: np.ndarray, factor: float) -> None:
    grey = luma(pixels)[:, :, None] * np.float32(1 - factor)
    _store_deep(pixels, pixels * np.float32(factor) + grey)


def _hue_deep(pixels: np.ndarray, shift: float) -> None:
    hsv = cv2.cvtColor(pixels * np.float32(1 / 65535), cv2.COLOR_RGB2HSV)
    hsv[:, :, 0] = (hsv[:, :, 0] + np.float32(360 * shift)) % 360
    _store_deep(pixels, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(65535))


def _gray_deep(pixels: np.ndarray) -> None:
    pixels[...] = luma(pixels)[:, :, None]


def _solarize_deep(pixels: np.ndarray) -> None:
    np.subtract(65535, pixels, out=pixels, where=pixels >= 32768, dtype=np.uint16)
