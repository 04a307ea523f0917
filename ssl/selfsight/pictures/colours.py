"""Arrays as images: heat, overlays, sheets."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from PIL import Image

# Dark blue over violet and orange to light yellow: even in lightness, so that it reads without
# colour too. Interpolated between these points.
_HEAT = np.array(
    [(10, 8, 38), (66, 16, 104), (138, 34, 106), (206, 66, 70), (243, 132, 28), (252, 252, 168)],
    np.float32,
)


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape as uint8 RGB of that shape and 3."""
    place = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    part = (place - low)[..., None].astype(np.float32)
    return (_HEAT[low] * (1 - part) + _HEAT[low + 1] * part).round().astype(np.uint8)


def stretched(values: np.ndarray) -> np.ndarray:
    """Scaled so that the least is 0 and the most 1; of equal values all 0."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def enlarged(values: np.ndarray, size: tuple[int, int], *, smooth: bool = False) -> Image.Image:
    """uint8 (rows, columns[, 3]) as an image of `size` (width, height); every place a square of one
    colour, or blended where `smooth`."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(values).resize(size, how)


def attention_picture(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A map (rows, columns) of attention as heat, over the image in grey."""
    warm = enlarged(heat(stretched(values)), image.size, smooth=True)
    return Image.blend(image.convert("L").convert("RGB"), warm, 0.72)


def mask_picture(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image where a mask (rows, columns) holds, dimmed and grey elsewhere."""
    inside = enlarged(mask.astype(np.uint8) * 255, image.size)
    dim = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "black"), 0.6)
    return Image.composite(image, dim, inside.convert("L"))


def rgb(pixels: np.ndarray) -> Image.Image:
    """Pixels (c, h, w), uint8 or uint16, as an RGB image: of two channels the first, of many the
    first three."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.shape[0] < 3:
        pixels = np.repeat(pixels[:1], 3, axis=0)
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))


def sprite(images: Sequence[Image.Image], side: int) -> tuple[Image.Image, int, int]:
    """All images, square, in one: the sheet, its columns and its rows, row by row."""
    columns = max(1, ceil(len(images) ** 0.5))
    rows = max(1, ceil(len(images) / columns))
    sheet = Image.new("RGB", (columns * side, rows * side))
    for n, image in enumerate(images):
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(image, (n % columns * side, n // columns * side))
    return sheet, columns, rows
