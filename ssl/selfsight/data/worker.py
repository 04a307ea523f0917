"""Loader processes: each owns lanes of the stream, and is replaced when it dies, hangs or grows.

The only state of a worker is that of its lanes, which comes back with every batch, so another goes
on from the last batch it finished: no sample is lost or doubled. What it is at is marked in shared
memory: a sample over which it dies twice, or hangs, is passed over and listed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection

import cv2
import numpy as np
import torch

from selfsight.data.lane_reader import LaneReader, Mark, NoUsableSample, Portion, Settle
from selfsight.data.ledger import Failure
from selfsight.data.ring import Ring
from selfsight.distributed.preempt import shielded

STARTING = 60.0  # seconds that the imports of a new worker may take
MOST_DEATHS = 5  # of one worker at one batch; more is not the fault of a sample

# Workers are forked from a clean server process ("forkserver", the default of Python 3.14) instead
# of from the training process: forking a process with threads can deadlock, and children forked
# later would hold the pipes of their siblings open, so that a death would go unnoticed. It costs
# one import of torch a run. Elsewhere "spawn".
_METHODS = multiprocessing.get_all_start_methods()
CONTEXT = (
    multiprocessing.get_context("forkserver")
    if "forkserver" in _METHODS
    else multiprocessing.get_context("spawn")
)


def start_server() -> None:
    """Start the process that workers are forked from, in the background.

    A loader with workers does it by itself; called at the start of a program, the seconds that
    importing torch takes there overlap with what the program does before its first batch.
    """
    if CONTEXT.get_start_method() == "forkserver":
        CONTEXT.set_forkserver_preload(["__main__", __name__])
        with shielded():  # a signal to the whole job is for the main process, which ends workers
            forkserver.ensure_running()


@dataclass(frozen=True)
class WorkerLimits:
    """When a worker is ended and replaced.

    Attributes:
        decode_seconds: longest time for decoding and cropping one sample.
        fetch_seconds: longest time for fetching one, or opening its shard.
        growth_gb: gigabytes that its memory may grow after its first batch.
    """

    decode_seconds: float = 60.0
    fetch_seconds: float = 900.0
    growth_gb: float = 4.0


@dataclass
class _Question:
    """A worker asks how many shards a pass of a source has."""

    number: int
    epoch: int


@dataclass
class _Answer:
    names: list[str]


@dataclass
class _Error:
    reason: str
    trace: str


@dataclass
class _Done:
    portion: Portion
    retires: bool


def _resident() -> int:
    """Bytes of memory that belong to this process alone; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123 (called after every batch)
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _work(
    reader: LaneReader,
    ring: Ring,
    marks: Ring,
    number: int,
    offset: int,
    cursors: np.ndarray,
    growth: float,
    pipe: Connection,
) -> None:
    """Body of a worker: fill its lanes of a slot for each slot number received, until EOF."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    mark = Mark(marks.slot(0)[0][number])
    asked: deque[int] = deque()
    baseline = 0

    def settle(source: int, epoch: int) -> list[str]:
        pipe.send(_Question(source, epoch))
        while not isinstance(message := pipe.recv(), _Answer):
            asked.append(message)
        return message.names

    first = reader.own.start - offset
    own = slice(first, first + len(reader.own))
    try:
        while True:
            slot = asked.popleft() if asked else pipe.recv()
            arrays = [array[:, own] for array in ring.slot(slot)]
            try:
                portion = reader.read(cursors, arrays, settle, mark)
            except NoUsableSample as error:
                pipe.send(error)
                return
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                pipe.send(_Error(reason, traceback.format_exc()))
                return
            cursors = portion.cursors
            baseline = baseline or _resident()
            retires = _resident() - baseline > growth * 1e9
            pipe.send(_Done(portion, retires))
            if retires:
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process has closed the loader, or is gone
    finally:
        reader.close()


class Worker:
    """The main process's end of a worker: its lanes, what it was asked for and what it finished.

    Args:
        reader: what it runs.
        ring: where batches are written.
        marks: one row of int64 (3,) a worker, see `Mark`.
        number: of this worker.
        offset: the first lane of this rank.
        cursors: state of its lanes.
        slots: slots it is to fill, in order.
        limits: when it is replaced.
        settle: answers what its lanes ask about new passes.
    """

    def __init__(
        self,
        reader: LaneReader,
        ring: Ring,
        marks: Ring,
        number: int,
        offset: int,
        cursors: np.ndarray,
        slots: int,
        limits: WorkerLimits,
        settle: Settle,
    ) -> None:
        self._reader, self._ring, self._marks = reader, ring, marks
        self._number, self._offset = number, offset
        self._cursors = cursors  # after the last batch received from it
        self._asked = deque(range(slots))  # slots it was given and has not finished
        self._limits, self._settle = limits, settle
        self._mark = Mark(marks.slot(0)[0][number])
        self._deaths: list[int] = []  # where it died since its last finished batch
        self.done: deque[Portion] = deque()  # finished, not yet handed out
        self._start()

    def ask(self, slot: int) -> None:
        """Have it fill `slot` with the next batch."""
        self._quiet = 0.0
        self._asked.append(slot)
        with contextlib.suppress(OSError):  # it is dead, which `receive` notices
            self.pipe.send(slot)

    def receive(self) -> None:
        """Take one message; where it has died instead, start another from the last good state."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
            return
        self._spoke, self._quiet = True, 0.0
        if isinstance(message, NoUsableSample):
            raise message
        if isinstance(message, _Error):
            raise RuntimeError(f"a loader worker failed with {message.reason}.") from RuntimeError(
                message.trace
            )
        if isinstance(message, _Question):
            names = self._settle(message.number, message.epoch)
            with contextlib.suppress(OSError):
                self.pipe.send(_Answer(names))
            return
        assert isinstance(message, _Done)
        self._cursors = message.portion.cursors
        self._asked.popleft()
        self._deaths = []
        self.done.append(message.portion)
        if message.retires:
            self.stop()
            self._start()

    def ready(self) -> bool:
        """Whether a batch of it can be taken now, or almost."""
        return bool(self.done) or self.pipe.poll()

    def watch(self) -> None:
        """End it if it has been at one sample for too long, and pass that sample over; or if it
        has shown no sign of life at all since somebody waits for it."""
        at = self._mark.read()
        if not self._asked:
            return
        if at is None:
            most = self._limits.fetch_seconds
            most = most if self._spoke else max(most, STARTING)
            self._quiet = self._quiet or time.monotonic()
            if time.monotonic() - self._quiet > most:
                self._died()
            return
        self._quiet = 0.0
        position, phase, seconds = at
        decoding = phase == Mark.DECODING
        most = self._limits.decode_seconds if decoding else self._limits.fetch_seconds
        if seconds > most:
            doing = "decoding" if decoding else "fetching"
            self._replace(position, f"{doing} it took more than {most:g} s")

    def stop(self) -> None:
        """End it, at once: it holds nothing that would need an orderly end."""
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        self._spoke = False  # since it was started
        self._quiet = 0.0  # when it was first seen doing nothing, 0 if it was not
        self._mark.clear()
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_work,
            args=(
                self._reader,
                self._ring,
                self._marks,
                self._number,
                self._offset,
                self._cursors,
                self._limits.growth_gb,
                theirs,
            ),
            name=f"loader-{self._number}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        for slot in self._asked:
            self.pipe.send(slot)

    def _died(self) -> None:
        """It is gone, or as good as that: start another. The sample of a second death at one place
        is passed over."""
        at = self._mark.read()
        position = -1 if at is None else at[0]
        if at is not None:
            self.process.join(1.0)  # for its exit status
        code = self.process.exitcode
        again = position >= 0 and position in self._deaths
        self._deaths.append(position)
        if len(self._deaths) >= MOST_DEATHS:
            self.stop()
            raise RuntimeError(
                f"a loader worker died {MOST_DEATHS} times at the same batch: the machine may be "
                "out of memory (use fewer workers or a smaller prefetch)."
            )
        if again:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            self._replace(position, f"a process died over it twice ({how})")
            return
        self.stop()
        self._start()

    def _replace(self, position: int, reason: str) -> None:
        """Start another one, which passes over the sample at `position`."""
        self.stop()
        self._reader.events[position] = Failure("", "", reason, position)
        self._start()
