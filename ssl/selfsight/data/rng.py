"""Random numbers that are a function of a name instead of a history.

A draw depends only on what it is for (seed, epoch, sample, view, slot), so nothing has to be
stored, skipped or replayed, and one option never shifts the draws of another. The generator is
SplitMix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators") read at an
index: the n-th output of the stream with seed s is `mix(s + n * GOLDEN)`. The finaliser is
Stafford's variant 13. With plain operators, `mix` takes Python integers and uint64 arrays alike.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TypeVar

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

Word = TypeVar("Word", int, np.ndarray)


def mix(x: Word) -> Word:
    """Scramble a 64-bit word (or a uint64 array of them); a bijection on 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hash64(*parts: int | str) -> int:
    """A 64-bit hash of a sequence of integers and strings, the same on every machine."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def uniforms(seeds: np.ndarray, slots: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (len(seeds), slots), one stream a uint64 seed."""
    steps = np.arange(1, slots + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (mix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53
