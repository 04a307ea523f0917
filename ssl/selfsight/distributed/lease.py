"""One writer for a run's folder: a lease that a second run on the same folder respects.

    lease.json               who holds the folder: a token, made anew by each holder
    .lease_TOKEN.beat        the holder's heartbeat: a number that grows, or "released"

No lock of the file system is used (NFS and object mounts have none that can be relied on), and no
exclusive creation (on old NFS two clients can both succeed, and one whose answer was lost fails
at what it did). What is used: a rename replaces a file whole, a file that is opened after another
machine closed it shows what was written, and every file has one writer. `lease.json` is only ever
written by who takes the lease, so a heartbeat can never write over a take-over; the last rename
wins, and everyone else sees at the next `check` that the token is not theirs any more. Clocks are
never compared: a contender watches for one lease time whether the heartbeat changes, by its own
monotonic clock. `check` comes just before each commit, so what is left of the race is the moment
between a check and the rename that follows it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "lease.json"
SECONDS = 60.0
LONGEST = 3600.0  # lease time that is believed of another
_POLLS = 20  # looks at a heartbeat during one lease time
_TRIES = 5  # at reading a file that is just being replaced


class LeaseRefused(ValueError):
    """Another run holds the folder; one sentence that names it."""


class LostLease(ValueError):
    """This run held the folder, and another has taken it: nothing more may be written."""


@dataclass(frozen=True)
class Holder:
    """What `lease.json` says of who holds the folder."""

    token: str
    job: str
    restart: int
    seconds: float
    host: str
    process: int
    started: str
    """When the process started, by its kernel; with `process` and `kernel` it is one of a kind."""
    kernel: str
    """Boot and process namespace: where two agree, process numbers mean the same."""

    def __str__(self) -> str:
        return f"job {self.job} (process {self.process} on {self.host})"


class Lease:
    """The right of this process to write into a run's folder. Rank 0 holds it for its job.

    Args:
        folder: the run's folder; it exists.
        job_id: of the job; a job that the cluster runs again keeps its number.
        restart_count: how often it has been run again.
        seconds: a holder that gives no sign of life for so long is taken for dead.
    """

    def __init__(
        self, folder: Path | str, job_id: str, restart_count: int = 0, seconds: float = SECONDS
    ) -> None:
        self.folder, self.seconds = Path(folder), seconds
        self.own = Holder(
            token=uuid.uuid4().hex,
            job=job_id,
            restart=restart_count,
            seconds=seconds,
            host=socket.gethostname(),
            process=os.getpid(),
            started=_started(os.getpid()) or "",
            kernel=_kernel(),
        )
        self._beats = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------- taking

    def acquire(self) -> str | None:
        """Take the lease; returns a sentence where it was taken over from a run that is dead.

        It returns at once where nobody holds it, its holder has released it, was an earlier start
        of the same job, or was a process of this machine that is gone; otherwise it watches the
        holder for up to one lease time.

        Raises:
            LeaseRefused: the holder lives, or is a later start of this job.
            OSError: the folder cannot be written.
        """
        notice = None
        while (holder := _read_holder(self.folder)) is not None and not self._released(holder):
            if holder.job == self.own.job and holder.restart > self.own.restart:
                raise LeaseRefused(
                    f"{self.folder} belongs to {holder}, start {holder.restart} of this job, and "
                    f"this is start {self.own.restart}: an older start does not take it back"
                )
            if holder.job == self.own.job and holder.restart < self.own.restart:
                break
            if _gone(holder, self.own):
                notice = f"took {self.folder} over from {holder}, which has ended"
                break
            if self._shows_life(holder):
                raise LeaseRefused(
                    f"{self.folder} is being written by {holder}: wait for it, stop it, or choose "
                    "another name="
                )
            if _read_holder(self.folder) != holder:
                continue  # somebody else was faster: watch that one
            notice = f"took {self.folder} over from {holder}, which gives no sign of life"
            break
        self._beat()
        _replace(self.folder / FILE, json.dumps(vars(self.own), indent=1))
        for path in self.folder.glob(".lease_*.beat"):
            if path != self._beat_file(self.own):
                path.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        atexit.register(self.release)  # a start that is refused later on releases it too
        return notice

    def _released(self, holder: Holder) -> bool:
        return _read(self._beat_file(holder)) == "released"

    def _wait(self, holder: Holder) -> float:
        return min(max(self.seconds, holder.seconds), LONGEST)

    def _shows_life(self, holder: Holder) -> bool:
        """Whether the holder's heartbeat, or the lease itself, changes within a lease time."""
        wait = self._wait(holder)
        first = _read(self._beat_file(holder))
        end = time.monotonic() + wait
        while time.monotonic() < end:
            time.sleep(wait / _POLLS)
            if _read_holder(self.folder) != holder:
                return False
            if _gone(holder, self.own):
                return False
            now = _read(self._beat_file(holder))
            if now != first:
                return now != "released"
        return False

    # ------------------------------------------------------------------------------ holding

    @property
    def lost(self) -> bool:
        """Whether another has taken the lease, as far as the heartbeat has noticed."""
        return self._over.is_set() and self._thread is not None

    def check(self) -> None:
        """Read the token: call it just before each commit.

        Raises:
            LostLease: it is another's, or gone.
        OSError: it cannot be read now; the commit must wait.
        """
        assert self._thread is not None, "the lease is not held"
        holder = _read_holder(self.folder)
        if holder is None or holder.token != self.own.token:
            self._over.set()
            who = f"{holder} has taken it" if holder else f"{FILE} is gone"
            raise LostLease(
                f"this run no longer holds {self.folder} ({who}): it leaves without writing more"
            )

    def release(self) -> None:
        """Let the next run in without a wait. What another has taken meanwhile stays as it is."""
        if self._thread is None:
            return
        lost, thread = self._over.is_set(), self._thread
        self._thread = None
        atexit.unregister(self.release)
        self._over.set()
        thread.join(5.0)
        if not lost:
            with contextlib.suppress(OSError):
                self._beat_file(self.own).write_text("released")

    def _renew(self) -> None:
        wait = min(1.0, self.seconds / 6)  # a start at the same moment shows early
        while not self._over.wait(wait):
            wait = self.seconds / 6
            with contextlib.suppress(OSError):  # tried again; the lease outlasts several beats
                holder = _read_holder(self.folder)
                if holder is not None and holder.token != self.own.token:
                    self._over.set()
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._beat_file(self.own).write_text(str(self._beats))

    def _beat_file(self, holder: Holder) -> Path:
        return self.folder / f".lease_{holder.token}.beat"


def _read(path: Path) -> str | None:
    """The text of a file as it is on the server now; None where there is none.

    Raises:
        OSError: the server does not answer.
    """
    for attempt in range(_TRIES):
        try:
            # an NFS client asks for a folder's names again when the folder is opened
            os.close(os.open(path.parent, os.O_RDONLY))
            return path.read_text()
        except FileNotFoundError:
            return None
        except OSError:  # replaced while it was opened (ESTALE), or the server is away
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
    return None


def _read_holder(folder: Path) -> Holder | None:
    text = _read(folder / FILE)
    try:
        fields: dict[str, Any] = json.loads(text or "")
        holder = Holder(**fields)
    except (ValueError, TypeError):
        return None
    token_is_one = isinstance(holder.token, str) and len(holder.token) == 32
    numbers = isinstance(holder.restart, int) and isinstance(holder.seconds, int | float)
    return holder if token_is_one and holder.token.isalnum() and numbers else None


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _kernel() -> str:
    """What tells two kernels or process namespaces apart; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is no such process (or it has
    ended and only its parent has not been told yet)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _gone(holder: Holder, own: Holder) -> bool:
    """Whether the holder was a process of this machine that has ended, or this process itself,
    for an earlier run."""
    if not own.kernel or holder.kernel != own.kernel:
        return False
    if (holder.process, holder.started) == (own.process, own.started):
        return True
    return _started(holder.process) != holder.started
