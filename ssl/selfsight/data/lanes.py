"""The lanes of a global batch: which source each one reads, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.source import Source
from selfsight.data.stream import Permutation, Piece, Stream, lane_sources


def sources_of(source: Source) -> list[Source]:
    """The parts of a mixture, or the source itself."""
    return source.sources if isinstance(source, Mixture) else [source]


class Lanes:
    """A source, or a mixture of several, dealt to the lanes of a global batch. Picklable.

    Args:
        source: what is read.
        batch_size: number of lanes.
        seed: of the order and of the augmentation.
        passes: for each source, the number of shards in each settled pass; None: as they are now,
            for ever.

    Raises:
        ValueError: nothing to read, or more sources than lanes.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        passes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.count, self.seed = batch_size, seed
        self.sources = sources_of(source)
        weights = source.weights if isinstance(source, Mixture) else [1.0]
        self._source_of = lane_sources(weights, batch_size)
        self._lane_in_source = np.empty(batch_size, np.int64)
        self.streams: list[Stream] = []
        for n, part in enumerate(self.sources):
            own = np.flatnonzero(self._source_of == n)
            self._lane_in_source[own] = np.arange(len(own))
            shards = [part.shards()] if passes is None else passes[n]
            if not shards[0]:
                raise ValueError(f"the source {part.name} holds no image.")
            grows = passes is not None and part.grows
            self.streams.append(Stream(shards, part.pieces, len(own), seed, grows))

    def number(self, lane: int) -> int:
        """The number of the source that `lane` reads."""
        return int(self._source_of[lane])

    def piece(self, lane: int, turn: int) -> Piece:
        """What `lane` reads in that turn; UnknownPass where it is not settled yet."""
        stream = self.streams[self._source_of[lane]]
        return stream.piece(int(self._lane_in_source[lane]), turn)

    def members(self, lane: int, piece: Piece, length: int) -> Permutation:
        """The order in which `lane` reads the members of a piece."""
        return self.streams[self._source_of[lane]].members(piece, length)

    def settle(self, number: int, epoch: int, names: list[str]) -> None:
        """Begin pass `epoch` of a source, with the shards `names` appended to its list."""
        source, stream = self.sources[number], self.streams[number]
        known = stream.settled
        if epoch < known:
            return
        assert epoch == known, (epoch, known)
        if names:
            source.extend(names)
        stream.settle(epoch, source.shards())
