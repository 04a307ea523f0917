"""The order of the data: which image lane j reads next. Pure index arithmetic.

A global batch of B images has B lanes, and a lane reads pieces of shards, one after the other (a
piece is one image, unless the source has shards of many). Turn i of lane j is piece number
u = i * B + j of an endless sequence of passes. A pass over S shards of Q pieces each has S * Q
numbers; within it, piece u mod Q of shard permutation(seed, pass)[u div Q] is read, so that
neighbouring lanes, which belong to one process, read the pieces of one shard at about the same
time. Members of a piece come in an order of its own. So fewer images than lanes, and numbers that
B does not divide, need no special case; every image is read once a pass.

The state of a lane is three integers: entries read, its turn, and the member of that piece. Rank r
of W owns lanes r * B / W up to (r + 1) * B / W; who reads a lane never changes what it holds.

The permutation is a keyed Feistel network over a rectangle a x b that just covers N, with cycle
walking (Black and Rogaway 2002: "Ciphers with arbitrary finite domains"): no memory, any N.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple, overload

import numpy as np

from selfsight.data.rng import GOLDEN, MASK, hash64, mix

ROUNDS = 8
CURSOR = 3  # integers a lane: entries read, turn, member


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


class Piece(NamedTuple):
    """What a lane reads in one turn: a piece of a shard, in one pass over all of them."""

    epoch: int
    shard: int
    number: int


class UnknownPass(LookupError):
    """A pass begins for which it is not yet settled how many shards it has."""

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch


class Stream:
    """The endless order of the shards of one source in `lanes` lanes.

    Args:
        shards: number of shards in each pass that is settled, the first one first.
        pieces: parts that each shard is cut into.
        lanes: lanes that read this source (the global batch size, or this source's share of it).
        seed: another seed gives another order.
        grows: whether later passes have to be settled by `settle`; otherwise they are as the last.
    """

    def __init__(
        self, shards: Sequence[int], pieces: int, lanes: int, seed: int, grows: bool = False
    ) -> None:
        assert shards and min(shards) > 0 and pieces > 0 and lanes > 0
        self.pieces, self.lanes, self.seed, self.grows = pieces, lanes, seed, grows
        self._shards: list[int] = []
        self._ends: list[int] = []  # piece numbers at which the settled passes end
        for count in shards:
            self.settle(len(self._shards), count)
        self._epoch = -1  # of the permutation at hand

    @property
    def settled(self) -> int:
        """Number of passes whose shards are known one by one."""
        return len(self._shards)

    def settle(self, epoch: int, shards: int) -> None:
        """Say how many shards pass `epoch` has; passes are settled in order, each once."""
        if epoch < len(self._shards):
            assert self._shards[epoch] == shards, (epoch, shards, self._shards[epoch])
            return
        assert epoch == len(self._shards)
        self._shards.append(shards)
        start = self._ends[-1] if self._ends else 0
        self._ends.append(start + shards * self.pieces)

    def piece(self, lane: int, turn: int) -> Piece:
        """The piece that `lane` reads in that turn.

        Raises:
            UnknownPass: the source grows, and this is the first piece of a pass not yet settled.
        """
        number = turn * self.lanes + lane
        epoch = bisect_right(self._ends, number)
        if epoch < len(self._ends):
            offset = number - (self._ends[epoch - 1] if epoch else 0)
        elif self.grows:
            raise UnknownPass(len(self._ends))
        else:
            beyond, offset = divmod(number - self._ends[-1], self._shards[-1] * self.pieces)
            epoch += beyond
        if epoch != self._epoch:
            shards = self._shards[min(epoch, len(self._shards) - 1)]
            self._order = Permutation(shards, hash64("epoch order", self.seed, epoch))
            self._epoch = epoch
        return Piece(epoch, self._order(offset // self.pieces), offset % self.pieces)

    def members(self, piece: Piece, length: int) -> Permutation:
        """The order in which the `length` members of a piece are read."""
        return Permutation(length, hash64("members", self.seed, *piece))


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that `rank` of `world_size` owns; ValueError where they cannot be shared evenly."""
    if lanes % world_size:
        raise ValueError(
            f"a global batch of {lanes} images cannot be shared by {world_size} ranks: choose a "
            "batch size that the number of ranks divides."
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


def lane_sources(weights: Sequence[float], lanes: int) -> np.ndarray:
    """Which source each lane reads, int64 (lanes,), for sources of these weights.

    Each source gets its share of the lanes (largest remainders, at least one lane), and every
    stretch of lanes holds about the same mixture, so that each rank does.

    Raises:
        ValueError: more sources than lanes.
    """
    if len(weights) > lanes:
        raise ValueError(
            f"{len(weights)} sources cannot share a batch of {lanes} images: raise batch_size or "
            "mix fewer sources."
        )
    exact = np.asarray(weights, np.float64) * (lanes / sum(weights))
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while counts.sum() > lanes:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    while counts.sum() < lanes:
        counts[np.argmax(exact - counts)] += 1
    # source c's n-th lane wants the place (n + 1/2) / counts[c]: sorting the wishes spreads them
    wishes = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    sources = np.repeat(np.arange(len(counts)), counts)
    return sources[np.argsort(wishes, kind="stable")]
