"""Synthetic copies of images, weak and strong, each a function of (seed, index) alone.

Weak: what sharing does (a little cropped, scaled, compressed, brightened). Strong: what Copydays
calls so (Douze et al. 2009): large crops, turns, blur, paint over, colours and heavy compression,
several together.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from selfsight.data.decode import Encoded
from selfsight.data.pixels import RGB, from_array
from selfsight.data.sources.source import Record, Source

STRENGTHS = ("weak", "strong")


class Copies(Source):
    """One copy of each image of `source`, with the index of its original as label.

    Raises:
        ValueError: unknown strength.
    """

    def __init__(self, source: Source, strength: str, seed: int = 0) -> None:
        if strength not in STRENGTHS:
            raise ValueError(f"strength={strength!r} of copies is not weak or strong.")
        self.source, self.strength, self.seed = source, strength, seed
        self.name = f"{source.name}, {strength} copies"
        self.threads = source.threads

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return f"{self.strength}/{self.source.key(index)}"

    def read(self, index: int) -> Record:
        record = self.source.read(index)
        if isinstance(record.data, bytes):
            pixels = Encoded(record.data, None, RGB).decode()
        else:
            pixels = from_array(record.data, RGB)
        dice = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        copy = (weak_copy if self.strength == "weak" else strong_copy)(
            Image.fromarray(pixels), dice
        )
        return Record(f"{self.strength}/{record.key}", copy, index)

    def fingerprint(self) -> str:
        return f"{self.strength} {self.seed} of {self.source.fingerprint()}"


def weak_copy(image: Image.Image, dice: np.random.Generator) -> bytes:
    """A JPEG of quality 50 to 90 of nine tenths of the image, scaled and a little brighter."""
    image = _crop(image, dice, 0.9, 1.0)
    image = _scale(image, dice.uniform(0.7, 1.2))
    image = ImageEnhance.Brightness(image).enhance(dice.uniform(0.9, 1.1))
    return _jpeg(image, int(dice.integers(50, 91)))


def strong_copy(image: Image.Image, dice: np.random.Generator) -> bytes:
    """A JPEG of quality 10 to 40 of a third to nine tenths of the image, after three of: a turn,
    blur, paint over, colours, grey, a mirror."""
    image = _crop(image, dice, 0.35, 0.9)
    width, height = image.size
    operations = [
        lambda x: x.rotate(dice.uniform(-25, 25), Image.Resampling.BILINEAR, fillcolor=(127,) * 3),
        lambda x: x.filter(ImageFilter.GaussianBlur(dice.uniform(0.01, 0.03) * min(width, height))),
        lambda x: _paint(x, dice),
        lambda x: ImageEnhance.Color(
            ImageEnhance.Contrast(x).enhance(dice.uniform(0.5, 1.6))
        ).enhance(dice.uniform(0.0, 2.0)),
        lambda x: x.convert("L").convert("RGB"),
        lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]
    for number in dice.permutation(len(operations))[:3]:
        image = operations[number](image)
    return _jpeg(_scale(image, dice.uniform(0.4, 1.0)), int(dice.integers(10, 41)))


def _crop(image: Image.Image, dice: np.random.Generator, least: float, most: float) -> Image.Image:
    """A part with that share of the area."""
    side = dice.uniform(least, most) ** 0.5
    width, height = image.size
    w, h = max(1, round(width * side)), max(1, round(height * side))
    left, top = int(dice.integers(0, width - w + 1)), int(dice.integers(0, height - h + 1))
    return image.crop((left, top, left + w, top + h))


def _scale(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _paint(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """Three bars of one colour each over up to a fifth of the image."""
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = dice.uniform(0, image.width * 0.7), dice.uniform(0, image.height * 0.9)
        box = (x, y, x + image.width * dice.uniform(0.1, 0.4), y + image.height * 0.12)
        draw.rectangle(box, fill=tuple(int(c) for c in dice.integers(0, 256, 3)))
    return image


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
