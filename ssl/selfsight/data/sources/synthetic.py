"""Embedded synthetic images: small procedural scenes, so that a run needs no files.

A scene is a patterned ground with two or three things of one kind lying on it. Its class is the
pair (pattern, kind of thing): twelve of the 36 pairs, such that each pattern and each kind belongs
to two classes and neither decides the class alone. Everything else is arbitrary: size of the image,
colours, period and slant of the pattern, number, place, size, tilt and colours of the things,
specks, a bar in front, light from one side, exposure, noise. All classes draw from the same
colours, and the pixel at one place says next to nothing about the class.

No image is stored. Image i is a pure function of (seed, split, i), the same in every process, and
takes about half a millisecond.
"""

from __future__ import annotations

import cv2
import numpy as np

from selfsight.data.sources.scenes import OUTLINES, PATTERNS, SUBPIXEL, TURN, Dice
from selfsight.data.sources.source import Record, Source

_SPLITS = ("train", "val")

_PAIRS = [
    (pattern, kind)
    for shift in (0, 1)
    for pattern, kind in zip(PATTERNS, list(OUTLINES)[shift:] + list(OUTLINES)[:shift], strict=True)
]

_SLANT = TURN // 20  # 18 degrees: things stand more or less upright, as in photographs


class SyntheticScenes(Source):
    """Scenes of twelve classes, from 56 to 96 pixels a side.

    Args:
        length: number of images. They cost nothing until read.
        seed: another seed gives other images of the same classes.
        split: "train" or "val"; the two share no image.

    Raises:
        ValueError: unknown split, or no images.
    """

    def __init__(self, length: int = 100_000, seed: int = 0, split: str = "train") -> None:
        if split not in _SPLITS:
            raise ValueError(f"synthetic scenes have the splits train and val, not {split!r}.")
        if length < 1:
            raise ValueError(f"synthetic scenes need a length of at least 1, not {length}.")
        self.name = f"synthetic/{split}"
        self.classes = [f"{kind} on {pattern}" for pattern, kind in _PAIRS]
        self._length, self._seed, self._split = length, seed, split

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        return f"{self._split}/{self._seed}/{index}"

    def read(self, index: int) -> Record:
        """Draw scene `index`: uint8 RGB (height, width, 3), and its class."""
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name} has {self._length} images, there is no image {index}.")
        dice = Dice(self._seed, _SPLITS.index(self._split), index)
        label = dice.below(len(_PAIRS))
        pattern, kind = _PAIRS[label]
        height, width = dice.between(56, 96), dice.between(56, 96)
        y, x = np.ogrid[:height, :width]
        y, x = y.astype(np.int32), x.astype(np.int32)

        image = _ground(dice, pattern, y, x)
        for _ in range(dice.between(2, 3)):
            _thing(dice, image, kind)
        _clutter(dice, image)
        return Record(self.key(index), _exposed(dice, image, y, x), label)


def _ground(dice: Dice, pattern: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The pattern in two muted colours, the figure lighter than its ground."""
    cosine, sine = dice.turn(_SLANT)
    u = ((x * cosine + y * sine) >> 10) + dice.below(4096)
    v = ((y * cosine - x * sine) >> 10) + dice.below(4096)
    half_period = dice.between(4 * SUBPIXEL, 6 * SUBPIXEL + SUBPIXEL // 2)
    levels = PATTERNS[pattern](dice, u, v, half_period)

    middle, swing = dice.between(118, 138), dice.between(45, 60)
    dark = np.array(dice.colour(middle - swing, 20))
    light = np.array(dice.colour(middle + swing, 20))
    ramp = np.arange(256)[:, None]
    palette = (dark * (255 - ramp) + light * ramp) // 255
    return palette.astype(np.uint8)[levels]


def _thing(dice: Dice, image: np.ndarray, kind: str) -> None:
    """One thing anywhere in the image, of any colour, with a rim of the opposite brightness."""
    height, width = image.shape[:2]
    radius = min(height, width) * dice.between(18, 28) // 100
    column, row = (side * dice.between(10, 90) // 100 for side in (width, height))
    cosine, sine = dice.turn(_SLANT)
    # Upright: corner 0 of an outline points to the right, so a quarter turn is taken off.
    turned = OUTLINES[kind] @ np.array([[sine, -cosine], [cosine, sine]])
    corners = ((turned * radius) >> 20) + np.array([column, row]) * SUBPIXEL
    polygon = [corners.astype(np.int32)]
    tone = dice.below(256)
    cv2.fillPoly(image, polygon, dice.colour(tone, 100), cv2.LINE_AA, 4)
    cv2.polylines(image, polygon, True, dice.colour((tone + 128) % 256, 25), 1, cv2.LINE_AA, 4)


def _clutter(dice: Dice, image: np.ndarray) -> None:
    """Up to three specks, and in a third of the images a bar across everything."""
    height, width = image.shape[:2]
    for _ in range(dice.below(4)):
        place, radius = (dice.below(width), dice.below(height)), dice.between(2, 4)
        cv2.circle(image, place, radius, dice.colour(dice.below(256), 25), -1, cv2.LINE_AA)
    if dice.below(3) == 0:
        ends = ((0, dice.below(height)), (width, dice.below(height)))
        if dice.below(2):
            ends = ((dice.below(width), 0), (dice.below(width), height))
        colour = dice.colour(dice.below(256), 25)
        cv2.line(image, *ends, colour, dice.between(2, 5), cv2.LINE_AA)


def _exposed(dice: Dice, image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Light that falls off to one side, an exposure, and noise."""
    height, width = image.shape[:2]
    cosine, sine = dice.turn()
    distance = ((x - width // 2) * cosine + (y - height // 2) * sine) >> 14
    gain = 256 + dice.between(-20, 20) + distance * dice.below(41) // min(height, width)
    exposed = image * gain[..., None] >> 8
    exposed += (dice.octets(height, width, 3).astype(np.int32) - 128) * 6 >> 7
    return exposed.clip(0, 255).astype(np.uint8)
