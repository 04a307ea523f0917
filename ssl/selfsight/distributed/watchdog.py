"""Ends a job that hangs, and says which rank is missing, and where.

A collective waits for every rank. If one is stopped, stuck or lost, the others wait in silence: on
a GPU the host does not even see in what. So each rank tells a thread of its own which section of
the step it is in (`enter`), and the thread, for as long as the process runs, writes that to a small
file in the run's folder: a count that grows, step, section, and the innermost call of the main
thread. When a section takes longer than its limit, the ranks that wait read all those files twice:
a file that does not change is of a rank that is stopped or gone; the others' sections show who
went another way. Each rank that timed out says so on stderr and exits within `GRACE` seconds.

This is apart from the backend (gloo and NCCL alike), needs no working network and none of the
ranks, and its own reading is bounded too. The time-out of the process group should be longer.
Time in which this process itself was stopped (a suspended job, a closed lid) does not count.

    runs/NAME/.ranks/00003.json
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.distributed.env import World

GRACE = 5.0
EXIT_STATUS = 1
FOLDER = ".ranks"
_READING = 2.0  # seconds that reading all files may take
_LENGTH = 512  # bytes of a file: written in place and whole
# Files whose calls wait for other ranks: collectives, a backward pass (DDP's reductions), and the
# answer of a step's flags, in which the host waits for the device.
_WAITING = (
    "distributed_c10d.py", "_functional_collectives.py", "collectives.py", "graph.py", "preempt.py",
)  # fmt: skip
_SHOWN = 8  # ranks named one by one


@dataclass(frozen=True)
class Limits:
    """Seconds that one section may take.

    Attributes:
        first: until the first step is done: start-up, compilation, the first evaluation.
        step: any section of a later step.
        evaluation: sections named "evaluation".
        save: sections named "save".
    """

    first: float = 1800.0
    step: float = 300.0
    evaluation: float = 3600.0
    save: float = 1800.0

    def of(self, section: str, steps: int) -> float:
        """The limit of `section` after `steps` steps of this process."""
        if section in ("evaluation", "save"):
            return max(getattr(self, section), self.first if steps < 1 else 0.0)
        return self.step if steps >= 1 else self.first


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote."""

    rank: int
    count: int
    step: int
    section: str
    seconds: float
    """It has been in the section."""
    call: str
    """The innermost calls of its main thread."""
    waits: bool
    """It is where ranks wait for each other."""
    host: str
    line: int = 0
    """Of the function that called `enter`: how far in a step it is."""

    @property
    def place(self) -> tuple[int, int, str]:
        """Greater is further."""
        return self.step, self.line, self.section

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Watchdog:
    """Watches this process's sections. It starts in section "start-up"; use `close` at the end.

    Args:
        world: this process's place.
        folder: the run's folder, which all ranks see.
        limits: see there.
        exits: ends the process; for tests.
    """

    def __init__(
        self,
        world: World,
        folder: Path | str,
        limits: Limits | None = None,
        exits: Callable[[int], Any] = os._exit,
    ) -> None:
        self.world, self.limits = world, limits or Limits()
        self.folder = Path(folder) / FOLDER
        self._exits = exits
        self._main = threading.main_thread().ident
        self._host = socket.gethostname()
        self._begun = time.monotonic()
        self._at = ("start-up", 0, self._begun)  # replaced whole: read by the thread
        self._loop: CodeType | None = None  # the function that calls `enter`
        self._stopped = 0.0  # seconds of the section in which this process did not run
        self._steps = 0
        self._count = 0
        self._closed = threading.Event()
        shortest = min(self.limits.step, self.limits.save, self.limits.evaluation)
        self.interval = min(10.0, max(0.2, shortest / 10))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._threads = [
            threading.Thread(target=loop, name=name, daemon=True)
            for name, loop in (("heartbeat", self._beat), ("watchdog", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ for the main thread

    def enter(self, section: str, step: int) -> None:
        """The main thread is in `section` of update number `step` from now on (it costs 1 us)."""
        self._loop = self._loop or sys._getframe(1).f_code
        if section == self._at[0] and step == self._at[1]:
            return
        if step != self._at[1] and self._at[0] != "start-up":
            self._steps += 1
        self._stopped = 0.0
        self._at = (section, step, time.monotonic())

    @contextlib.contextmanager
    def within(self, section: str) -> Iterator[None]:
        """A section in the present step, and back to the one before it."""
        before, step, _ = self._at
        self.enter(section, step)
        try:
            yield
        finally:
            self.enter(before, step)

    def close(self) -> None:
        """Stop watching; this rank's file says that it left."""
        if self._closed.is_set():
            return
        self._closed.set()
        for thread in self._threads:
            thread.join(1.0)
        self._at = ("left", self._at[1], time.monotonic())
        with contextlib.suppress(OSError):
            self._write()

    # --------------------------------------------------------------------------- the threads

    def _beat(self) -> None:
        while not self._closed.wait(self.interval):
            with contextlib.suppress(OSError):  # the folder may be away for a while
                self._write()

    def _watch(self) -> None:
        """Compare the time in a section with its limit, a few times a second."""
        tick = min(0.25, self.interval / 2)
        early: dict[int, Beat] = {}
        before = time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            if now - before > tick + 2.0:  # we did not run: neither did the main thread
                self._stopped += now - before
            before = now
            section, step, since = self._at
            limit = self.limits.of(section, self._steps)
            left = limit - (now - since - self._stopped)
            if left > 1.5 * self.interval:
                early = {}
            elif left > 0:
                early = early or self._read()
            elif self._at[2] == since:
                self._end(section, step, limit, early)
                return

    def _end(self, section: str, step: int, limit: float, early: Mapping[int, Beat]) -> None:
        text = f"rank {self.world.rank}: '{section}' of step {step} took more than {limit:g} s"
        with contextlib.suppress(Exception):
            self._write_late()
            verdict = diagnose(self.world.size, early, self._read())
            text += f" ({self._call()[0]}); {verdict}"
        with contextlib.suppress(OSError):
            os.write(2, f"selfsight: time-out: {text}\n".encode())
        self._exits(EXIT_STATUS)

    # -------------------------------------------------------------------------------- files

    def _call(self) -> tuple[str, bool, int]:
        """The innermost calls of the main thread, whether they wait for other ranks, and the line
        that the loop is at."""
        frame = sys._current_frames().get(self._main or 0)
        calls: list[str] = []
        waits, line = False, 0
        while frame is not None:
            if len(calls) < 3:
                file = Path(frame.f_code.co_filename).name
                waits = waits or file in _WAITING
                if frame.f_code.co_name != "wrapper":
                    calls.append(f"{frame.f_code.co_name} {file}:{frame.f_lineno}")
            if frame.f_code is self._loop:
                line = frame.f_lineno
                break
            frame = frame.f_back
        return " < ".join(calls), waits, line

    def _write(self) -> None:
        section, step, since = self._at
        call, waits, line = self._call()
        self._count += 1
        seconds = round(time.monotonic() - since, 1)
        beat = [self.world.rank, self._count, step, section, seconds, call[:200], waits]
        text = json.dumps([*beat, self._host[:80], line]).ljust(_LENGTH)
        path = self.folder / f"{self.world.rank:05d}.json"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode()[:_LENGTH])
        finally:
            os.close(handle)

    def _write_late(self) -> None:
        """A last word for those who time out a moment later; the folder may hang too."""
        _bounded(self._write, 0.5)

    def _read(self) -> dict[int, Beat]:
        return _bounded(lambda: read_beats(self.folder, self.world.size), _READING) or {}


def read_beats(folder: Path, size: int) -> dict[int, Beat]:
    """What each rank of `size` last wrote; ranks without a whole file are left out."""
    beats = {}
    for rank in range(size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats[rank] = Beat(*json.loads((folder / f"{rank:05d}.json").read_text()))
    return beats


def diagnose(size: int, early: Mapping[int, Beat], late: Mapping[int, Beat]) -> str:
    """Which of `size` ranks the others wait for, in a sentence.

    Args:
        size: ranks of the world.
        early, late: two readings, more than a heartbeat apart.
    """
    if not late:
        return "the files that tell of the ranks cannot be read"
    never = [rank for rank in range(size) if rank not in late]
    left = [b for b in late.values() if b.section == "left"]
    silent = [b for r, b in late.items() if b.section != "left" and r in early and b == early[r]]
    if never or left or silent:
        parts = [f"rank {rank} never told where it was" for rank in never[:_SHOWN]]
        parts += [f"{b} has left after step {b.step}" for b in left[:_SHOWN]]
        parts += [f"{b} gives no sign of life, last in {_where(b)}" for b in silent[:_SHOWN]]
        more = len(never) + len(left) + len(silent) - len(parts)
        return "missing: " + "; ".join(parts) + (f"; and {more} more" if more > 0 else "")
    busy = [b for b in late.values() if not b.waits]
    if 0 < len(busy) < size:
        return "missing: " + "; ".join(f"{b} is in {_where(b)}" for b in busy[:_SHOWN])
    places = Counter(b.place for b in late.values())
    if len(places) > 1:
        fewest = min(places.values())
        odd = max(p for p, n in places.items() if n == fewest)  # of two, the one ahead
        others = max((p for p in places if p != odd), key=lambda p: places[p])
        names = "; ".join(f"{b} is in {_where(b)}" for b in late.values() if b.place == odd)
        return f"missing: {names}, and the others wait in '{others[2]}' of step {others[0]}"
    return "all ranks live and wait at the same place: look at the network between them"


def _where(beat: Beat) -> str:
    return f"'{beat.section}' of step {beat.step} ({beat.call})"


def _bounded(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns; None where it failed or took longer (its thread is left behind)."""
    found: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
