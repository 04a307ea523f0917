"""The first images of the stream, each once, as the lanes of a run meet them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import count, islice
from typing import NamedTuple

from selfsight.data.lanes import Lanes, sources_of
from selfsight.data.sources.source import Record, Source
from selfsight.data.stream import Piece, UnknownPass

CHUNK = 64  # images that are fetched, then worked on
MOST_SHARDS = 8  # opened at the same time, where a source has shards of many images


class Entry(NamedTuple):
    """One image of the stream, or a piece of a shard that could not be opened.

    Attributes:
        source: number of its source.
        key: its name, or that of the shard.
        record: the image, or None where it could not be fetched.
        error: why, one line.
    """

    source: int
    key: str
    record: Record | None
    error: str = ""


class _Place(NamedTuple):
    source: int
    piece: Piece
    member: int
    error: OSError | None = None


class Sample:
    """Reads the lanes of a global batch in turns, an entry each, through the first pass.

    Of a source of single images these are the first ones that a run with that batch size and seed
    reads; of one of large shards they come from few of them, since each has to be opened.

    Args:
        source: what is read.
        batch_size, seed: those of the run.

    Attributes:
        complete: whether every image of the data was met.

    Raises:
        ValueError: nothing to read.
    """

    def __init__(self, source: Source, batch_size: int, seed: int) -> None:
        parts = sources_of(source)
        lanes = batch_size
        if not all(part.flat for part in parts):
            few = MOST_SHARDS * max(part.pieces for part in parts)
            lanes = min(batch_size, max(few, len(parts)))
        self.lanes = Lanes(source, lanes, seed)
        self.complete = False

    def chunks(self, limit: int) -> Generator[list[Entry], None, None]:
        """Up to `limit` entries, `CHUNK` at a time, in the order of the stream.

        Where a source waits for a network, as many reads are in flight as it asks for.
        """
        threads = max(source.threads for source in self.lanes.sources)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="sample") if threads else None
        places, read = self._places(pool), 0
        try:
            while read < limit:
                chunk = list(islice(places, min(CHUNK, limit - read)))
                if not chunk:
                    break
                read += len(chunk)
                yield list(pool.map(self._fetch, chunk) if pool else map(self._fetch, chunk))
            self.complete = next(places, None) is None
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _places(self, pool: Executor | None) -> Iterator[_Place]:
        active = [(lane, self._lane(lane)) for lane in range(self.lanes.count)]
        first = True
        while active:
            ended = set()
            for start in range(0, len(active), CHUNK):
                group = active[start : start + CHUNK]
                if first and pool is not None:  # shards are opened side by side
                    list(pool.map(self._open, {self._first(lane) for lane, _ in group}))
                for lane, places in group:
                    place = next(places, None)
                    if place is None:
                        ended.add(lane)
                    else:
                        yield place
            active = [pair for pair in active if pair[0] not in ended]
            first = False

    def _lane(self, lane: int) -> Iterator[_Place]:
        number = self.lanes.number(lane)
        source = self.lanes.sources[number]
        for turn in count():
            try:
                piece = self.lanes.piece(lane, turn)
            except UnknownPass:
                return
            if piece.epoch:
                return
            try:
                length = 1 if source.flat else source.length(piece.shard, piece.number)
            except OSError as error:
                yield _Place(number, piece, -1, error)
                continue
            order = self.lanes.members(lane, piece, length) if length > 1 else None
            for member in range(length):
                yield _Place(number, piece, member if order is None else order(member))

    def _first(self, lane: int) -> tuple[int, int]:
        """(number of the source, shard) of the lane's first piece."""
        return self.lanes.number(lane), self.lanes.piece(lane, 0).shard

    def _open(self, place: tuple[int, int]) -> None:
        source = self.lanes.sources[place[0]]
        if not source.flat:
            try:
                source.length(place[1], 0)
            except OSError:
                return  # its lanes will meet it, and say so

    def _fetch(self, place: _Place) -> Entry:
        source = self.lanes.sources[place.source]
        piece, error = place.piece, place.error
        if error is None:
            try:
                record = source.fetch(piece.shard, piece.number, place.member)
                return Entry(place.source, record.key, record)
            except OSError as failure:
                error = failure
        key = source.fetch_key(piece.shard, piece.number, place.member)
        return Entry(place.source, key, None, " ".join(str(error).split()) or type(error).__name__)


class Held(Source):
    """Records at hand, as a source."""

    def __init__(self, name: str, records: list[Record]) -> None:
        self.name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Record:
        return self._records[index]

    def key(self, index: int) -> str:
        return self._records[index].key
