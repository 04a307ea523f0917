"""Batches from a source, by worker processes that own lanes of the stream.

A worker reads whole lanes, never whole batches, and writes its samples' views straight into the
slots of a ring of batches in shared memory; the main process copies nothing. Its only state is one
cursor a lane, which comes back with every batch, so a worker that dies is replaced and goes on from
the last batch it finished: no sample is lost or doubled, and the batches are the same, bit for bit,
for any number of workers, with none, and at any number of ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import time
import traceback
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait

import cv2
import numpy as np
import torch
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.data.decode import MAX_PIXELS, DecodeError
from selfsight.data.ledger import Failure, Ledger
from selfsight.data.multicrop import MultiCrop
from selfsight.data.sources.source import Source
from selfsight.data.stream import Stream, lanes_of

BAD_IN_A_ROW = 100  # samples of one lane; then the data is wrong, not a sample
DEATHS_IN_A_ROW = 3  # of one worker at one batch; then restarting does not help

# Workers are forked from a clean server process ("forkserver", the default of Python 3.14) instead
# of from the training process: forking a process with threads can deadlock, and children forked
# later would hold the pipes of their siblings open, so that a death would go unnoticed. It costs
# one import of torch a run. Elsewhere "spawn".
_METHODS = multiprocessing.get_all_start_methods()
_CONTEXT = (
    multiprocessing.get_context("forkserver")
    if "forkserver" in _METHODS
    else multiprocessing.get_context("spawn")
)


def start_server() -> None:
    """Start the process that workers are forked from, in the background.

    A loader with workers does it by itself; called at the start of a program, the seconds that
    importing torch takes there overlap with what the program does before its first batch.
    """
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(["__main__", __name__])
        forkserver.ensure_running()


@dataclass
class Portion:
    """What is known about a range of lanes of one batch, beside its views."""

    positions: np.ndarray  # int64, stream position of each sample
    labels: np.ndarray  # int64, -1 for none
    cursors: np.ndarray  # int64, next entry of each lane after this batch
    failures: list[Failure]


class NoUsableSample(ValueError):
    """A lane met only samples that cannot be used. `failures` are those."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message, failures)
        self.failures = failures

    def __str__(self) -> str:
        return self.args[0]


class LaneReader:
    """Reads a range of lanes: one sample of each into the views of a batch. Picklable."""

    def __init__(
        self, source: Source, multicrop: MultiCrop, stream: Stream, lanes: range, max_pixels: int
    ) -> None:
        self.source, self.multicrop, self.stream = source, multicrop, stream
        self.lanes, self.max_pixels = lanes, max_pixels

    def read(self, cursors: np.ndarray, views: list[np.ndarray]) -> Portion:
        """Fill views (count, lanes, s, s, 3) with the entries at `cursors`, or the next usable."""
        n = len(self.lanes)
        out = Portion(np.empty(n, np.int64), np.empty(n, np.int64), cursors.copy(), [])
        for i, lane in enumerate(self.lanes):
            outs = [group[:, i] for group in views]
            for _ in range(BAD_IN_A_ROW):
                entry = self.stream.entry(lane, int(out.cursors[i]))
                out.cursors[i] += 1
                key = None
                try:
                    record = self.source.read(entry.item)
                    key = record.key
                    self.multicrop(
                        record.data,
                        outs,
                        seed=self.stream.seed,
                        epoch=entry.epoch,
                        key=key,
                        max_pixels=self.max_pixels,
                    )
                except (DecodeError, OSError) as error:
                    key = self.source.key(entry.item) if key is None else key
                    reason = str(error) or type(error).__name__
                    out.failures.append(Failure(self.source.name, key, reason, entry.position))
                    continue
                out.positions[i] = entry.position
                out.labels[i] = -1 if record.label is None else record.label
                break
            else:
                last = out.failures[-1]
                raise NoUsableSample(
                    f"{BAD_IN_A_ROW} samples in a row of the source {last.source} could not be "
                    f"used, the last of them {last.key} ({last.reason}): check the data.",
                    out.failures,
                )
        return out


class Ring:
    """Slots of batches in memory that the workers share. Picklable while a process is started."""

    def __init__(self, multicrop: MultiCrop, images: int, slots: int) -> None:
        self._shapes = multicrop.shapes(images)
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        # RawArray is mapped from an unlinked file in /dev/shm, or in the temporary folder where a
        # container's /dev/shm is too small, and so nothing is left behind by a kill.
        self._memory = _CONTEXT.RawArray(ctypes.c_uint8, sum(self._sizes) * slots)

    def slot(self, number: int) -> list[np.ndarray]:
        """The views of a slot, one uint8 array (count, images, s, s, 3) a group."""
        memory = np.ctypeslib.as_array(self._memory)
        start, views = number * sum(self._sizes), []
        for shape, size in zip(self._shapes, self._sizes, strict=True):
            views.append(memory[start : start + size].reshape(shape))
            start += size
        return views


def _work(reader: LaneReader, ring: Ring, first: int, cursors: np.ndarray, pipe: Connection):
    """Body of a worker: fill its lanes of a slot for each slot number received, until EOF."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    own = slice(first, first + len(reader.lanes))
    try:
        while True:
            views = [group[:, own] for group in ring.slot(pipe.recv())]
            try:
                portion = reader.read(cursors, views)
            except NoUsableSample as error:
                pipe.send(error)
                return
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                pipe.send((reason, traceback.format_exc()))
                return
            cursors = portion.cursors
            pipe.send(portion)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process has closed the loader, or is gone


class _Worker:
    """The main process's end of a worker: its lanes, what it was asked for and what it finished."""

    def __init__(
        self, reader: LaneReader, ring: Ring, first: int, cursors: np.ndarray, slots: int
    ) -> None:
        self._reader, self._ring, self._first = reader, ring, first
        self._cursors = cursors  # after the last batch received from it
        self._asked = deque(range(slots))  # slots it was given and has not finished
        self._deaths = 0  # since its last finished batch
        self.done: deque[Portion] = deque()  # finished, not yet handed out
        self._start()

    def ask(self, slot: int) -> None:
        """Have it fill `slot` with the next batch."""
        self._asked.append(slot)
        with contextlib.suppress(OSError):  # it is dead, which `receive` notices
            self.pipe.send(slot)

    def receive(self) -> None:
        """Take one message; where it has died instead, start another from the last good state."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self._replace()
            return
        if isinstance(message, NoUsableSample):
            raise message
        if isinstance(message, tuple):
            reason, trace = message
            raise RuntimeError(f"a loader worker failed with {reason}.") from RuntimeError(trace)
        self._cursors = message.cursors
        self._asked.popleft()
        self._deaths = 0
        self.done.append(message)

    def stop(self) -> None:
        """End it, at once: it holds nothing that would need an orderly end."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()

    def _start(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_work,
            args=(self._reader, self._ring, self._first, self._cursors, theirs),
            name=f"loader-{self._first}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        for slot in self._asked:
            self.pipe.send(slot)

    def _replace(self) -> None:
        self.stop()
        self._deaths += 1
        if self._deaths >= DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"a loader worker died {self._deaths} times at the same batch: the machine may be "
                "out of memory (use fewer workers or a smaller prefetch), or a sample crashes it."
            )
        self._start()


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
        cursors: int64 (batch_size / world_size,), next entry of each lane, as `cursors` gave them;
            None starts at the beginning.
        ledger: where samples that cannot be used are listed; None lists them nowhere.
        max_pixels: images with more pixels are not decoded.

    The tensors of a batch are views of shared memory: they are valid until the following `next()`.
    Use it as a context manager, or call `close()`.

    Raises:
        ValueError: batch_size not divisible by world_size; from `next()`: only unusable samples.
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        lanes = lanes_of(rank, world_size, batch_size)
        start = torch.zeros(len(lanes), dtype=torch.int64) if cursors is None else cursors.clone()
        if start.shape != (len(lanes),):
            raise ValueError(
                f"the saved stream has {start.numel()} lanes on this rank and a batch of "
                f"{batch_size} images on {world_size} ranks needs {len(lanes)}: resume with the "
                "batch size that the run was started with."
            )
        self.cursors = start
        self.wait_seconds = 0.0
        self._ledger = ledger
        if ledger is not None:
            ledger.resume(int(start.min()) * batch_size)
        stream = Stream(len(source), batch_size, seed)
        workers = min(workers, len(lanes))
        self._slots = prefetch + 1 if workers else 1
        self._ring = Ring(multicrop, len(lanes), self._slots)
        self._count = 0  # batches handed out
        self._reader: LaneReader | None = None
        self._workers: list[_Worker] = []
        if not workers:
            self._reader = LaneReader(source, multicrop, stream, lanes, max_pixels)
            return
        start_server()
        bounds = [len(lanes) * n // workers for n in range(workers + 1)]
        for first, end in pairwise(bounds):
            reader = LaneReader(source, multicrop, stream, lanes[first:end], max_pixels)
            own = self.cursors.numpy()[first:end].copy()
            self._workers.append(_Worker(reader, self._ring, first, own, self._slots))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        slot = self._count % self._slots
        try:
            portions = self._portions(slot)
        except BaseException as error:
            self.close()
            if isinstance(error, NoUsableSample):
                self._list(error.failures)
                raise ValueError(str(error)) from None
            raise
        self._count += 1
        for portion in portions:
            self._list(portion.failures)
        self.cursors = torch.from_numpy(np.concatenate([p.cursors for p in portions]))
        views = [torch.from_numpy(v).permute(0, 1, 4, 2, 3) for v in self._ring.slot(slot)]
        positions = torch.from_numpy(np.concatenate([p.positions for p in portions]))
        labels = torch.from_numpy(np.concatenate([p.labels for p in portions]))
        self.wait_seconds += time.perf_counter() - start
        return Batch(views, positions, labels)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Batches already handed out stay valid."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._reader = None

    def _portions(self, slot: int) -> list[Portion]:
        """Wait until every lane of the next batch is in its slot."""
        if self._reader is not None:
            return [self._reader.read(self.cursors.numpy(), self._ring.slot(slot))]
        if not self._workers:
            raise RuntimeError("the loader is closed.")
        if self._count:  # the batch before is no longer in use: its slot may be filled again
            for worker in self._workers:
                worker.ask((self._count - 1) % self._slots)
        while waiting := [worker for worker in self._workers if not worker.done]:
            ready = wait([worker.pipe for worker in waiting])
            for worker in waiting:
                if worker.pipe in ready:
                    worker.receive()
        return [worker.done.popleft() for worker in self._workers]

    def _list(self, failures: list[Failure]) -> None:
        if self._ledger is not None and failures:
            self._ledger.write(failures)
