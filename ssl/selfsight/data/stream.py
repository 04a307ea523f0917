"""The order of the data: which item lane j reads as its i-th entry. Pure index arithmetic.

A global batch of B images has B lanes. Entry i of lane j has position p = i * B + j in an endless
sequence of epochs: epoch p // N, item permutation(seed, epoch)[p mod N]. So fewer images than
lanes, and a number of images that B does not divide, need no special case. Rank r of W owns lanes
r * B / W up to (r + 1) * B / W; who reads a lane never changes what it holds. The whole state is
one integer a lane: its next entry.

The permutation is a keyed Feistel network over a rectangle a x b that just covers N, with cycle
walking (Black and Rogaway 2002: "Ciphers with arbitrary finite domains"): no memory, any N.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple, overload

import numpy as np

from selfsight.data.rng import GOLDEN, MASK, hash64, mix

ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of range(length), a function of the key alone.

    Call it with one index (int) or with an int64 array of indices. Memory does not grow with
    `length`; a call costs some microseconds.
    """

    def __init__(self, length: int, key: int) -> None:
        assert 0 < length <= 1 << 62, length
        self.length = length
        # a * b < length + a: outside indices are so rare that cycle walking is almost free. The
        # rectangle keeps at least two columns and rows, where there are two items at all.
        self._a = isqrt(length - 1) + 1
        self._b = -(-length // self._a)
        self._keys = [mix((key + n * GOLDEN) & MASK) for n in range(1, ROUNDS + 1)]

    @overload
    def __call__(self, index: int) -> int: ...
    @overload
    def __call__(self, index: np.ndarray) -> np.ndarray: ...
    def __call__(self, index):
        if isinstance(index, np.ndarray):
            assert ((index >= 0) & (index < self.length)).all()
            out = self._walk(index.astype(np.uint64))
            while (outside := out >= self.length).any():
                out[outside] = self._walk(out[outside])
            return out.astype(np.int64)
        assert 0 <= index < self.length
        index = self._walk(index)
        while index >= self.length:
            index = self._walk(index)
        return index

    def _walk(self, x):
        a, b = self._a, self._b
        left, right = x % a, x // a
        for n, key in enumerate(self._keys):
            if n % 2:
                right = (right + mix(left ^ key) % b) % b
            else:
                left = (left + mix(right ^ key) % a) % a
        return left + a * right


class Entry(NamedTuple):
    """One entry of a lane: its position in the global stream, its epoch, and the item to read."""

    position: int
    epoch: int
    item: int


class Stream:
    """The endless order of a source of `length` items in `lanes` lanes (the global batch size)."""

    def __init__(self, length: int, lanes: int, seed: int) -> None:
        assert length > 0 and lanes > 0
        self.length = length
        self.lanes = lanes
        self.seed = seed
        self._epoch = -1  # of the permutation at hand

    def entry(self, lane: int, cursor: int) -> Entry:
        """The `cursor`-th entry of `lane`."""
        position = cursor * self.lanes + lane
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = Permutation(self.length, hash64("epoch order", self.seed, epoch))
            self._epoch = epoch
        return Entry(position, epoch, self._order(offset))


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that `rank` of `world_size` owns; ValueError where they cannot be shared evenly."""
    if lanes % world_size:
        raise ValueError(
            f"a global batch of {lanes} images cannot be shared by {world_size} ranks: choose a "
            "batch size that the number of ranks divides."
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)
