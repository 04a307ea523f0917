"""Colour, grey, blur and solarisation of one uint8 crop, operation by operation, with OpenCV.

Each operation is that of torchvision on Pillow images (what SwAV and DINO were trained with), and
clamps to [0, 255] like it: fusing brightness, contrast and saturation into one matrix loses the
clamps and is off by 4.6/255 in the mean, and a hue rotation in YIQ by 5.5/255. Blur is a true
Gaussian, where Pillow's is three box filters. All functions work in place on contiguous uint8 RGB
(height, width, 3).
"""

from __future__ import annotations

from math import ceil

import cv2
import numpy as np

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
