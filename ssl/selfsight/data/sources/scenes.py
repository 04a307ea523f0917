"""Vocabulary of the synthetic scenes: dice, colours, ground patterns and outlines of things.

Whatever decides a pixel is integer arithmetic on raw words of a counter-based generator (Philox,
Salmon et al. 2011: "Parallel random numbers: as easy as 1, 2, 3"): no distribution of NumPy, whose
streams may change between versions, and no sine of the machine's own mathematics library.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

# A turn has 1024 steps. Rounded to 14 bits, cosine and sine are equal on every machine.
TURN = 1024
_COSINE_SINE = [
    (round(math.cos(math.tau * k / TURN) * (1 << 14)), round(math.sin(math.tau * k / TURN) * 2**14))
    for k in range(TURN)
]

# Lengths in the plane of a pattern are in sixteenths of a pixel.
SUBPIXEL = 16

Pattern = Callable[["Dice", np.ndarray, np.ndarray, int], np.ndarray]


class Dice:
    """Random integers as a pure function of (seed, stream, index)."""

    def __init__(self, seed: int, stream: int, index: int) -> None:
        key = np.array([seed, index], dtype=np.uint64)
        counter = np.array([0, 0, 0, stream], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        if not self._words:
            self._words = self._bits.random_raw(64).tolist()
        return ((self._words.pop() >> 32) * n) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def octets(self, *shape: int) -> np.ndarray:
        """A uint8 array of that shape, every value equally likely."""
        count = math.prod(shape)
        words = self._bits.random_raw((count + 7) // 8)
        return words.astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)

    def turn(self, most: int = TURN // 2) -> tuple[int, int]:
        """Cosine and sine, times 2**14, of an angle of at most `most` steps either way."""
        return _COSINE_SINE[self.between(-most, most) % TURN]

    def colour(self, tone: int, saturation: int) -> tuple[int, int, int]:
        """A colour of about that brightness; channels differ from it by up to `saturation`."""
        red, green, blue = (
            min(255, max(0, tone + self.between(-saturation, saturation))) for _ in range(3)
        )
        return red, green, blue


def _wave(x: np.ndarray, half: int) -> np.ndarray:
    """Triangle wave: 0 to `half`, period 2 * half."""
    return np.abs(x % (2 * half) - half)


def _edge(x: np.ndarray, half: int, steepness: int) -> np.ndarray:
    """Map [-half, half] to [0, 255], the steeper the sharper around 0."""
    return (x * (128 * steepness) // half + 128).clip(0, 255).astype(np.uint8)


def _stripes(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    return _edge(2 * _wave(u, half) - half, half, 3)


def _zigzag(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    return _edge(2 * _wave(u + _wave(v, half) * 3 // 2, half) - half, half, 3)


def _checks(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    return _edge((2 * _wave(u, half) - half) * (2 * _wave(v, half) - half) // half, half, 4)


def _dots(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    return _edge(
        (half * half * 5 // 9 - _wave(u, half) ** 2 - _wave(v, half) ** 2) // half, half, 4
    )


def _bricks(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    course = v // half
    across = (u + (course & 1) * half) % (2 * half)
    mortar = half // 5 + SUBPIXEL // 4
    return np.where((v - course * half < mortar) | (across < mortar), 255, 0).astype(np.uint8)


def _patches(dice: Dice, u: np.ndarray, v: np.ndarray, half: int) -> np.ndarray:
    height, width = u.shape
    rows, columns = (side * SUBPIXEL // half + 2 for side in (height, width))
    coarse = dice.octets(rows, columns)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return _edge(smooth.astype(np.int32) - 128, 128, 5)


# A pattern gets (dice, u, v, half): int32 coordinates of each pixel in the turned plane and half a
# period. It returns uint8 levels: 0 is the ground, 255 the figure on it.
PATTERNS: dict[str, Pattern] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "bricks": _bricks,
    "zigzag": _zigzag,
    "patches": _patches,
}


def _ring(*radii: float, corners: int) -> np.ndarray:
    """Corners of a polygon around the origin, their distances from `radii` in turn, times 1024."""
    angles = [math.tau * k / corners for k in range(corners)]
    points = [
        (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
        for k, a in enumerate(angles)
    ]
    return np.rint(np.array(points) * 1024).astype(np.int64)


def _cross(arm: float, half: float) -> np.ndarray:
    """A plus sign: arms of length `arm` and width 2 * half."""
    quarter = [(arm, -half), (arm, half), (half, half)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return np.rint(np.array(points) * 1024).astype(np.int64)


def _box(width: float, height: float) -> np.ndarray:
    corners = [(width, height), (-width, height), (-width, -height), (width, -height)]
    return np.rint(np.array(corners) * 1024).astype(np.int64)


# Corners (n, 2) of each kind of thing, x to the right and y down, times 1024, for radius 1.
OUTLINES: dict[str, np.ndarray] = {
    "disc": _ring(1.0, corners=36),
    "triangle": _ring(1.0, corners=3),
    "star": _ring(1.0, 0.42, corners=10),
    "cross": _cross(0.96, 0.29),
    "square": _ring(1.0, corners=4),
    "bar": _box(0.98, 0.29),
}
