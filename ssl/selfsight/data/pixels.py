"""The pixels that views are made of: how many channels, how many bits, and how others become them.

What becomes RGB how: transparency is laid over white, as a web page shows it; 16-bit values are
scaled by 255/65535; wider integers and floats by their own range, or floats within [0, 1] by 255;
other modes as Pillow does. One channel is the luma of that (ITU-R 601, as in Pillow). With 16 bits,
8-bit values are multiplied by 257, so that white is 65535, and 16-bit ones are kept. Another number
of channels is never made up: the image must have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from selfsight.data.decode_limits import DecodeError

_STRIP = 1 << 22  # pixels converted at a time: bounds the copies of a large image


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """What images are decoded to.

    Attributes:
        channels: 3 for RGB, 1 for grey; any other number is taken from images that have so many.
        bits: 8 (uint8) or 16 (uint16).
    """

    channels: int = 3
    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 512:
            raise ValueError(f"pixels: channels must be 1 to 512, but it is {self.channels}.")
        if self.bits not in (8, 16):
            raise ValueError(f"pixels: bits must be 8 or 16, but it is {self.bits}.")

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """uint8 or uint16."""
        return np.uint8 if self.bits == 8 else np.uint16

    @property
    def top(self) -> int:
        """The value of white, 255 or 65535."""
        return (1 << self.bits) - 1


RGB = PixelFormat()


def from_array(pixels: np.ndarray, form: PixelFormat = RGB) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) of uint8 or uint16 in another format; DecodeError if impossible.

    The array itself is returned where it has the format already.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
        raise DecodeError(
            f"an array {pixels.shape} of {pixels.dtype}, not (height, width, channels) of uint8 or "
            "uint16"
        )
    channels = pixels.shape[2]
    if channels != form.channels:
        if (channels, form.channels) == (3, 1):
            pixels = luma(pixels)[:, :, None]
        elif (channels, form.channels) == (1, 3):
            pixels = np.repeat(pixels, 3, axis=2)
        else:
            raise DecodeError(f"{channels} channels, where {form.channels} are wanted")
    if pixels.dtype != form.dtype:
        if form.bits == 16:
            pixels = pixels.astype(np.uint16) * np.uint16(257)
        else:
            scaled = pixels.astype(np.float32) * (255 / 65535) + 0.5
            pixels = scaled.astype(np.uint8)
    return pixels


def luma(pixels: np.ndarray) -> np.ndarray:
    """Grey (H, W) of RGB (H, W, 3), uint8 or uint16, by Pillow's integer weights."""
    total = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((total + 32768) >> 16).astype(pixels.dtype)


def from_image(image: Image.Image, form: PixelFormat = RGB) -> np.ndarray:
    """A decoded Pillow image as pixels (H, W, C), contiguous; DecodeError if impossible."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        if mode.startswith("I;16"):
            if form.bits == 16:
                values = values.astype(np.uint16)
            else:
                values = (values.astype(np.float32) * (255 / 65535) + 0.5).astype(np.uint8)
        else:
            values = (_to_range(values.astype(np.float64), form.top) + 0.5).astype(form.dtype)
        return np.ascontiguousarray(from_array(values, form))
    if form.channels not in (1, 3):
        if mode == "P" or len(image.getbands()) != form.channels:
            have = "a palette" if mode == "P" else f"{len(image.getbands())} channels"
            raise DecodeError(f"{have}, where {form.channels} channels are wanted")
        return np.ascontiguousarray(from_array(np.array(image), form))
    out = np.empty((image.height, image.width, form.channels), form.dtype)
    for top, bottom, strip in strips(image):
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        pixels = np.asarray(strip.convert("RGB" if form.channels == 3 else "L"))
        out[top:bottom] = from_array(pixels, form)
    return out


def from_halves(high: Image.Image, low: Image.Image, form: PixelFormat) -> np.ndarray:
    """16-bit RGB or RGBA, its high and low bytes decoded into an 8-bit image each."""
    values = np.array(high).astype(np.uint16) << 8
    values |= np.asarray(low)
    if values.shape[2] == form.channels:
        return np.ascontiguousarray(values)
    if values.shape[2] == 4 and form.channels in (1, 3):
        share = values[:, :, 3:].astype(np.float64) / 65535
        values = values[:, :, :3] * share + 65535 * (1 - share) + 0.5
        values = values.astype(np.uint16)
    return np.ascontiguousarray(from_array(values, form))


def strips(image: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """(top, bottom, those rows) of an image, a bounded number of pixels at a time."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        yield 0, height, image
        return
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield top, bottom, image.crop((0, top, width, bottom))


def _to_range(values: np.ndarray, white: int) -> Any:
    """Values of an unknown range as [0, white]."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise DecodeError("pixel values that are not finite")
    if low >= 0 and high <= 1:
        return values * white
    if low >= 0 and 255 < high <= 65535:
        return values * (white / 65535)
    return (values - low) * (white / (high - low)) if high > low else np.zeros_like(values)
