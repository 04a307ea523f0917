"""Batches from a source, by worker processes that own lanes of the stream.

A worker reads whole lanes, never whole batches, and writes its samples' views straight into the
slots of a ring of batches in shared memory; the main process copies nothing. The batches are the
same, bit for bit, for any number of workers, with none, and at any number of ranks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from itertools import pairwise
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.data.lane_reader import LaneReader, Mark, NoUsableSample, Portion, start_cursors
from selfsight.data.lanes import Lanes
from selfsight.data.ledger import Failure, Ledger
from selfsight.data.multicrop import MultiCrop
from selfsight.data.photometric_batch import COLUMNS, DTYPE, apply
from selfsight.data.ring import Ring
from selfsight.data.sources.source import Source
from selfsight.data.stream import CURSOR, lanes_of
from selfsight.data.stream_log import StreamLog
from selfsight.data.worker import CONTEXT, Worker, WorkerLimits, start_server

__all__ = ["Loader", "start_server"]

ALARM_SAMPLES = 1000  # over so many the share of bad ones is taken
WATCH_SECONDS = 1.0  # between two looks at workers that are waited for


class Loader:
    """Endless batches of one rank.

    Args:
        source: where samples come from.
        multicrop: what is made of each.
        batch_size: images of the global batch, over all ranks.
        seed: seeds the order and the augmentation.
        rank, world_size: which lanes are ours.
        workers: processes; 0 does the work in `next()`.
        prefetch: batches that the workers may be ahead.
        cursors: int64 (batch_size / world_size, 3), state of each lane, as `cursors` gave it; None
            starts at the beginning.
        ledger: where samples that cannot be used are listed, and by which those are passed over
            that could not be used before; None lists them nowhere.
        log: settles how many shards each pass has; None: as many as now.
        options: further arguments of `multicrop`, such as limits for decoding.
        max_bad_share: the largest share of samples that may be bad.
        limits: when a worker is replaced.

    The tensors of a batch are views of shared memory: they are valid until the following `next()`.
    Use it as a context manager, or call `close()`.

    Attributes:
        cursors: state of our lanes after the batch that was handed out last.
        wait_seconds: time spent waiting in `next()`.

    Raises:
        ValueError: batch_size not divisible by world_size, cursors of another batch size; from
            `next()`: nothing but unusable samples, or too many of them.
        RuntimeError: from `next()`: a worker failed, or dies again and again.
    """

    def __init__(
        self,
        source: Source,
        multicrop: MultiCrop,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        cursors: Tensor | None = None,
        ledger: Ledger | None = None,
        log: StreamLog | None = None,
        options: Mapping[str, Any] | None = None,
        max_bad_share: float = 1.0,
        limits: WorkerLimits | None = None,
    ) -> None:
        own = lanes_of(rank, world_size, batch_size)
        start = torch.from_numpy(start_cursors(len(own))) if cursors is None else cursors.clone()
        if start.shape != (len(own), CURSOR):
            raise ValueError(
                f"the saved stream has {len(start)} lanes on this rank and a batch of "
                f"{batch_size} images on {world_size} ranks needs {len(own)}: resume with the "
                "batch size that the run was started with."
            )
        self.cursors = start
        self.wait_seconds = 0.0
        self._ledger, self._log = ledger, log
        self._alarm = _Alarm(max_bad_share)
        self._lanes = Lanes(source, batch_size, seed, None if log is None else log.passes)
        events: dict[int, Failure] = {}
        if ledger is not None:
            events = ledger.resume(int(start[:, 0].min()) * batch_size)
        options = dict(options or {})
        workers = min(workers, len(own))
        self._slots = prefetch + 1 if workers else 1
        shapes = multicrop.shapes(len(own))
        dtypes = [multicrop.dtype] * len(shapes)
        self._groups = len(shapes)
        if not multicrop.colour:
            shapes += [(count, images, COLUMNS) for count, images, *_ in shapes]
            dtypes += [DTYPE] * len(dtypes)
        self._ring = Ring(shapes, dtypes, self._slots, CONTEXT)
        self._marks = Ring([(max(1, workers), 3)], [np.dtype(np.int64)], 1, CONTEXT)
        self._count = 0  # batches handed out
        self._reader: LaneReader | None = None
        self._workers: list[Worker] = []
        if not workers:
            self._reader = LaneReader(self._lanes, own, multicrop, options, events)
            return
        start_server()
        for n, (first, end) in enumerate(
            pairwise(len(own) * n // workers for n in range(workers + 1))
        ):
            self._workers.append(
                Worker(
                    LaneReader(self._lanes, own[first:end], multicrop, options, events),
                    self._ring,
                    self._marks,
                    n,
                    own.start,
                    self.cursors.numpy()[first:end].copy(),
                    self._slots,
                    limits or WorkerLimits(),
                    self._settle,
                )
            )

    @property
    def memory(self) -> np.ndarray:
        """The memory that the views of all batches lie in, uint8."""
        return self._ring.memory

    def ready(self) -> bool:
        """Whether `next()` would return without waiting for workers."""
        return bool(self._workers) and all(worker.ready() for worker in self._workers)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        slot = self._count % self._slots
        try:
            portions = self._portions(slot)
            for portion in portions:
                self._list(portion.failures)
            self._alarm.count(portions)
        except BaseException as error:
            self.close()
            if isinstance(error, NoUsableSample):
                self._list(error.failures)
                raise ValueError(str(error)) from None
            raise
        self._count += 1
        self.cursors = torch.from_numpy(np.concatenate([p.cursors for p in portions]))
        arrays = self._ring.slot(slot)
        views = [torch.from_numpy(v).permute(0, 1, 4, 2, 3) for v in arrays[: self._groups]]
        positions = torch.from_numpy(np.concatenate([p.positions for p in portions]))
        labels = torch.from_numpy(np.concatenate([p.labels for p in portions]))
        self.wait_seconds += time.perf_counter() - start
        return Batch(views, positions, labels, arrays[self._groups :])

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Batches already handed out stay valid."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _portions(self, slot: int) -> list[Portion]:
        """Wait until every lane of the next batch is in its slot."""
        if self._reader is not None:
            cursors, arrays = self.cursors.numpy(), self._ring.slot(slot)
            return [self._reader.read(cursors, arrays, self._settle, Mark())]
        if not self._workers:
            raise RuntimeError("the loader is closed.")
        if self._count:  # the batch before is no longer in use: its slot may be filled again
            for worker in self._workers:
                worker.ask((self._count - 1) % self._slots)
        while waiting := [worker for worker in self._workers if not worker.done]:
            ready = wait([worker.pipe for worker in waiting], WATCH_SECONDS)
            for worker in waiting:
                if worker.pipe in ready:
                    worker.receive()
                else:
                    worker.watch()
        return [worker.done.popleft() for worker in self._workers]

    def _settle(self, number: int, epoch: int) -> list[str]:
        """Names of the shards that join source `number` with its pass `epoch`."""
        assert self._log is not None
        names = self._log.settle(number, epoch)
        self._lanes.settle(number, epoch, names)
        return names

    def _list(self, failures: list[Failure]) -> None:
        if self._ledger is not None and failures:
            self._ledger.write(failures)


def finish_colour(views: list[Tensor], batch: Batch) -> None:
    """Do to the views, in place and on their device, what `batch` says is left to do."""
    for group, rows in zip(views, batch.colour, strict=bool(batch.colour)):
        apply(group, rows)


class _Alarm:
    """Stops a run that learns from what is left of bad data."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._recent: deque[tuple[int, list[Failure]]] = deque()
        self._samples = self._bad = 0

    def count(self, portions: list[Portion]) -> None:
        """Add a batch; ValueError where too many of the latest samples were bad."""
        failures = [failure for portion in portions for failure in portion.failures]
        good = sum(len(portion.positions) for portion in portions)
        self._recent.append((good + len(failures), failures))
        self._samples += good + len(failures)
        self._bad += len(failures)
        while self._samples - self._recent[0][0] >= ALARM_SAMPLES:
            samples, old = self._recent.popleft()
            self._samples -= samples
            self._bad -= len(old)
        if self._samples < ALARM_SAMPLES or self._bad <= self._share * self._samples:
            return
        reasons = Counter(f.reason for _, bad in self._recent for f in bad).most_common(3)
        listed = "; ".join(f"{n} times: {reason}" for reason, n in reasons)
        raise ValueError(
            f"{self._bad} of the last {self._samples:,} samples could not be used, more than "
            f"loader.max_bad_share={self._share:g} ({listed}): look at ledger.jsonl, mend "
            "the data, or raise the share."
        )
