"""Thumbnails and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 144  # pixels a side of a thumbnail
COLUMNS = 8  # of the sheet of images
MARGIN, CAPTION = 10, 16
GROUND, EMPTY, INK, FAINT = "#1f2226", "#2a2e33", "#e6e4df", "#9a9ea5"


@dataclass
class Picture:
    """An image of the sample and its crops, ready to be shown.

    Attributes:
        key: name of the image.
        width, height: of the image, upright, in pixels.
        image: it, at most CELL pixels a side.
        views: its crops, one list a group; empty where they are not shown.
    """

    key: str
    width: int
    height: int
    image: Image.Image
    views: list[list[Image.Image]]


def picture(
    key: str, size: tuple[int, int], pixels: np.ndarray, views: Sequence[np.ndarray]
) -> Picture:
    """Of pixels (H, W, C) and crops (count, s, s, C) a group, uint8 or uint16."""
    step = max(1, min(pixels.shape[:2]) // (4 * CELL))  # no need to convert what is made small
    thumbnail = shown(pixels[::step, ::step])
    thumbnail.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    crops = [[shown(crop) for crop in group] for group in views]
    return Picture(key, *size, thumbnail, crops)


def shown(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W, C) as an RGB image: of two channels the first, of many the first three."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def image_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """All images, each upright and whole, with its size in pixels."""
    columns = min(COLUMNS, len(pictures))
    rows = ceil(len(pictures) / columns)
    width, height = CELL + MARGIN, CELL + CAPTION + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for n, item in enumerate(pictures):
        left, top = MARGIN + n % columns * width, MARGIN + n // columns * height
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), EMPTY)
        place = (left + (CELL - item.image.width) // 2, top + (CELL - item.image.height) // 2)
        sheet.paste(item.image, place)
        text = f"{item.width} x {item.height}"
        draw.text((left + CELL // 2, top + CELL + 3), text, FAINT, font, anchor="ma")
    return sheet


def crop_sheet(pictures: Sequence[Picture], groups: Sequence[str]) -> Image.Image:
    """A row an image: the image, then its views group by group, at their sizes to each other."""
    largest = max(view.width for item in pictures for group in item.views for view in group)
    scale = min(1.0, CELL / largest)
    sides = [max(8, round(group[0].width * scale)) for group in pictures[0].views]
    counts = [len(group) for group in pictures[0].views]
    head = 24
    row = max(CELL, *sides) + MARGIN
    lefts, left = [], MARGIN + CELL + 2 * MARGIN
    for side, count in zip(sides, counts, strict=True):
        lefts.append(left)
        left += count * (side + MARGIN // 2) + 2 * MARGIN - MARGIN // 2
    sheet = Image.new("RGB", (left - MARGIN, head + MARGIN + len(pictures) * row), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((MARGIN, MARGIN), "image", INK, font)
    for name, place, group in zip(groups, lefts, pictures[0].views, strict=True):
        draw.text((place, MARGIN), f"{name} {group[0].width}", INK, font)
    for n, item in enumerate(pictures):
        top = head + MARGIN + n * row
        place = (MARGIN + (CELL - item.image.width) // 2, top + (CELL - item.image.height) // 2)
        sheet.paste(item.image, place)
        for views, start, side in zip(item.views, lefts, sides, strict=True):
            for v, view in enumerate(views):
                small = view if view.width == side else view.resize((side, side))
                sheet.paste(small, (start + v * (side + MARGIN // 2), top + (CELL - side) // 2))
    return sheet
