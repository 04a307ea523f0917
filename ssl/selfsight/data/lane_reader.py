"""Reads a range of lanes of a global batch: one usable sample of each lane, into given memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from selfsight.data.decode import DecodeError
from selfsight.data.lanes import Lanes
from selfsight.data.ledger import Failure
from selfsight.data.multicrop import MultiCrop
from selfsight.data.photometric_batch import pack
from selfsight.data.sources.source import Record, Source
from selfsight.data.stream import CURSOR, Permutation, Piece, UnknownPass

BAD_IN_A_ROW = 100  # samples of one lane; then the data is wrong, not a sample
EMPTY_IN_A_ROW = 10_000  # pieces of one lane that hold nothing

Settle = Callable[[int, int], list[str]]
"""(number of the source, pass) -> names of the shards that join with that pass."""


@dataclass
class Portion:
    """What is known about a range of lanes of one batch, beside its views."""

    positions: np.ndarray  # int64, place in the stream of each sample
    labels: np.ndarray  # int64, -1 for none
    cursors: np.ndarray  # int64 (lanes, 3), the state of each lane after this batch
    failures: list[Failure] = field(default_factory=list)


class NoUsableSample(ValueError):
    """A lane met only samples that cannot be used. `failures` are those."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message, failures)
        self.failures = failures

    def __str__(self) -> str:
        return self.args[0]


class Mark:
    """Where a reader is, in memory that another process watches: int64 (3,) of place in the
    stream, phase, and the time that the phase began (monotonic, nanoseconds; 0: between samples).
    """

    FETCHING, DECODING = 0, 1

    def __init__(self, memory: np.ndarray | None = None) -> None:
        self._memory = np.zeros(3, np.int64) if memory is None else memory

    def set(self, position: int, phase: int) -> None:
        self._memory[:] = position, phase, time.monotonic_ns()

    def clear(self) -> None:
        self._memory[2] = 0

    def read(self) -> tuple[int, int, float] | None:
        """(position, phase, seconds since), or None between samples."""
        position, phase, began = self._memory.tolist()
        return (position, phase, (time.monotonic_ns() - began) * 1e-9) if began else None


class _Open(NamedTuple):
    """The piece that a lane is reading."""

    turn: int
    piece: Piece
    length: int
    order: Permutation | None


class _Ahead(NamedTuple):
    turn: int
    member: int
    record: Future[Record]


class LaneReader:
    """Reads the lanes `own`. Picklable before its first use.

    Args:
        lanes: all lanes of the global batch.
        own: those that are read here.
        multicrop: what is made of each sample.
        options: further arguments of `multicrop`, such as limits for decoding.
        events: samples and pieces to pass over, by place in the stream.
    """

    def __init__(
        self,
        lanes: Lanes,
        own: range,
        multicrop: MultiCrop,
        options: Mapping[str, Any],
        events: Mapping[int, Failure] | None = None,
    ) -> None:
        self.lanes, self.own, self.multicrop, self.options = lanes, own, multicrop, dict(options)
        self.events = {p: f for p, f in (events or {}).items() if p % lanes.count in own}
        self._open: list[_Open | None] = [None] * len(own)
        self._ahead: list[deque[_Ahead]] = [deque() for _ in own]
        self._threads = max(source.threads for source in lanes.sources)
        self._pool: ThreadPoolExecutor | None = None

    def read(
        self, cursors: np.ndarray, arrays: list[np.ndarray], settle: Settle, mark: Mark
    ) -> Portion:
        """Fill the lanes of a batch from their state `cursors` (lanes, 3).

        Args:
            cursors: not changed.
            arrays: the views of each group (count, lanes, s, s, C); after them, where the
                multi-crop leaves colour to the device, what is to be done to each (count, lanes,
                photometric_batch.COLUMNS).
            settle: asked when a lane comes to a pass that is not settled.
            mark: told what is being read.

        Raises:
            NoUsableSample: a lane has nothing but bad samples.
        """
        n = len(self.own)
        out = Portion(np.empty(n, np.int64), np.empty(n, np.int64), cursors.copy())
        if self._threads:
            for i in range(n):
                self._fetch_ahead(i, *cursors[i, 1:].tolist())
        for i in range(n):
            outs = [array[:, i] for array in arrays]
            for _ in range(BAD_IN_A_ROW):
                if self._sample(i, out, outs, settle, mark):
                    break
            else:
                last = out.failures[-1]
                raise NoUsableSample(
                    f"{BAD_IN_A_ROW} samples in a row of the source {last.source} could not be "
                    f"used, the last of them {last.key} ({last.reason}): check the data.",
                    out.failures,
                )
        mark.clear()
        return out

    def close(self) -> None:
        """End the threads that fetch ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    # ------------------------------------------------------------------------------ one entry

    def _sample(
        self, i: int, out: Portion, outs: list[np.ndarray], settle: Settle, mark: Mark
    ) -> bool:
        """Read the next entry of the i-th lane; False where it cannot be used."""
        lane = self.own[i]
        cursor = out.cursors[i]
        position = int(cursor[0]) * self.lanes.count + lane
        cursor[0] += 1
        event = self.events.get(position)
        if event is not None and event.turn is not None:
            cursor[1:] = event.turn + 1, 0
            out.failures.append(event)
            return False
        source = self.lanes.sources[self.lanes.number(lane)]
        mark.set(position, Mark.FETCHING)
        try:
            opened = self._piece(i, lane, cursor, settle)
        except OSError as error:
            turn = int(cursor[1])
            shard = self.lanes.piece(lane, turn).shard
            key = source.fetch_key(shard, 0, -1)
            out.failures.append(Failure(source.name, key, _text(error), position, turn))
            cursor[1:] = turn + 1, 0
            return False
        place, member = opened.piece, int(cursor[2])
        cursor[2] += 1
        index = opened.order(member) if opened.order is not None else 0
        key = None
        try:
            if event is not None:
                key = event.key or source.fetch_key(place.shard, place.number, index)
                out.failures.append(event._replace(source=source.name, key=key))
                return False
            record = self._record(i, source, opened, member, index)
            key = record.key
            mark.set(position, Mark.DECODING)
            groups = len(self.multicrop.groups)
            plans = self.multicrop(
                record.data,
                outs[:groups],
                seed=self.lanes.seed,
                epoch=place.epoch,
                key=key,
                **self.options,
            )
        except (DecodeError, OSError) as error:
            if key is None:
                key = source.fetch_key(place.shard, place.number, index)
            out.failures.append(Failure(source.name, key, _text(error), position))
            return False
        if len(outs) > groups:
            table, first = pack(plans), 0
            for rows in outs[groups:]:
                rows[:] = table[first : first + len(rows)]
                first += len(rows)
        out.positions[i] = position
        out.labels[i] = -1 if record.label is None else record.label
        return True

    def _piece(self, i: int, lane: int, cursor: np.ndarray, settle: Settle) -> _Open:
        """The piece at the lane's cursor, which is moved on over the end of one and empty ones."""
        for _ in range(EMPTY_IN_A_ROW):
            turn = int(cursor[1])
            opened = self._open[i]
            if opened is None or opened.turn != turn:
                number = self.lanes.number(lane)
                source = self.lanes.sources[number]
                try:
                    piece = self.lanes.piece(lane, turn)
                except UnknownPass as unknown:
                    self.lanes.settle(number, unknown.epoch, settle(number, unknown.epoch))
                    piece = self.lanes.piece(lane, turn)
                length = 1 if source.flat else source.length(piece.shard, piece.number)
                order = self.lanes.members(lane, piece, length) if length > 1 else None
                opened = self._open[i] = _Open(turn, piece, length, order)
                self._announce(lane, turn + 1, source)
            if int(cursor[2]) < opened.length:
                return opened
            cursor[1:] = turn + 1, 0
        source = self.lanes.sources[self.lanes.number(lane)]
        raise NoUsableSample(
            f"the source {source.name} holds no image in {EMPTY_IN_A_ROW} pieces of its shards: "
            "check the data.",
            [],
        )

    def _announce(self, lane: int, turn: int, source: Source) -> None:
        if source.flat:
            return
        try:
            piece = self.lanes.piece(lane, turn)
        except UnknownPass:
            return
        source.will_need(piece.shard, piece.number)

    # ------------------------------------------------------------------------- reading ahead

    def _record(self, i: int, source: Source, opened: _Open, member: int, index: int) -> Record:
        """The record of one member: one that a thread has fetched, or read here."""
        if not source.threads:
            return source.fetch(opened.piece.shard, opened.piece.number, index)
        self._fetch_ahead(i, opened.turn, member)
        ahead = self._ahead[i]
        record = ahead.popleft().record
        self._fetch_ahead(i, opened.turn, member + 1)
        return record.result()

    def _fetch_ahead(self, i: int, turn: int, member: int) -> None:
        """Have the lane's next samples, from that one on, in flight."""
        lane = self.own[i]
        source = self.lanes.sources[self.lanes.number(lane)]
        if not source.threads:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="fetch")
        if source.flat and member:  # the end of a piece of one is the start of the next
            turn, member = turn + 1, 0
        ahead = self._ahead[i]
        while ahead and ahead[0][:2] != (turn, member):
            ahead.popleft().record.cancel()
        depth = 1 + 2 * source.threads // len(self.own)
        if ahead:
            turn, member = _after(ahead[-1].turn, ahead[-1].member, source)
        while len(ahead) < depth:
            try:
                piece = self.lanes.piece(lane, turn)
            except UnknownPass:
                return
            index = 0
            if not source.flat:
                opened = self._open[i]
                if opened is None or opened.turn != turn or member >= opened.length:
                    return
                index = opened.order(member) if opened.order is not None else 0
            record = self._pool.submit(source.fetch, piece.shard, piece.number, index)
            ahead.append(_Ahead(turn, member, record))
            turn, member = _after(turn, member, source)


def _after(turn: int, member: int, source: Source) -> tuple[int, int]:
    return (turn + 1, 0) if source.flat else (turn, member + 1)


def _text(error: Exception) -> str:
    """One line."""
    return " ".join(str(error).split()) or type(error).__name__


def start_cursors(lanes: int) -> np.ndarray:
    """The state of lanes that have read nothing, int64 (lanes, 3)."""
    return np.zeros((lanes, CURSOR), np.int64)
