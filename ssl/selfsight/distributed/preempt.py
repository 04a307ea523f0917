"""Wishes to stop, from signals and a file, that all ranks follow at the same step.

    USR2, TERM       "preempted": the cluster wants the machine; save, and run again
    `stop` file      "stop file": runs/NAME/stop exists; save and end; the file is removed
    INT (Ctrl-C)     "interrupt": save and end; a second one ends the process at once

A signal may reach one rank only. So each step's one small all-reduce, which every step needs to
learn whether a loss or gradient is not finite, carries the wish too (`Flags`), and its sum is the
same on all ranks. On a GPU its answer is read one step late, from page-locked memory that it was
copied to meanwhile, so that the host never waits for the device's whole queue.

This module imports torch only where it is used: `arm` is for a process's first lines.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Where ranks have seen different things the last one here wins: a user's wish to end is stronger
# than the cluster's wish to have the run elsewhere.
REASONS = ("preempted", "stop file", "interrupt")
PREEMPTION = (signal.SIGUSR2, signal.SIGTERM)
LOOK_SECONDS = 2.0  # between two looks for the stop file

_noted: str | None = None
_former: dict[signal.Signals, Any] = {}


def arm() -> None:
    """Have USR2 and TERM noted from now on instead of ending the process (idempotent).

    To be called in a job before torch is imported: both are deadly until then. What comes before
    the loop asks is not lost. Outside the main thread it does nothing. A parent that blocked them
    (a fork server started within `shielded`, say) has no say here: they are unblocked.
    """
    for number in PREEMPTION:
        if number not in _former:
            with contextlib.suppress(ValueError):  # not the main thread
                _former[number] = signal.signal(number, _note)
                if hasattr(signal, "pthread_sigmask"):
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def disarm() -> None:
    """Give the signals back to whom they belonged, and forget what was noted."""
    global _noted
    for number in list(_former):
        with contextlib.suppress(ValueError):
            signal.signal(number, _former.pop(number))
    _noted = None


def noted() -> str | None:
    """The reason to stop that a signal to this process gave, or None."""
    return _noted


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started within ignore USR2 and TERM for good, as a signal to a whole job demands.

    Signals to this process itself are noted, when it ends at the latest. (A blocked signal stays
    blocked over fork and exec; such a child is ended by KILL, or by the end of its pipe.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = _noted or "preempted"


class StopRequest:
    """What this rank knows of a wish to stop. The loop ends at a step boundary, saved.

    Args:
        stop_file: looked for every `LOOK_SECONDS`, by the rank that is given it (one is enough).

    Attributes:
        agreed: the reason that all ranks stop for, once `agree` or `follow` said so; else None.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.agreed: str | None = None
        self._file = stop_file
        self._seen: str | None = None
        self._look = 0.0
        self._interrupt: Any = None
        arm()
        with contextlib.suppress(ValueError):
            self._interrupt = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._seen == "interrupt":
            raise KeyboardInterrupt
        self._seen = "interrupt"

    @property
    def code(self) -> int:
        """0, or the place in `REASONS`, from 1, of what this rank has seen."""
        if self._file is not None and time.monotonic() >= self._look:
            self._look = time.monotonic() + LOOK_SECONDS
            if self._seen is None and self._file.exists():
                self._seen = "stop file"
        codes = [REASONS.index(reason) + 1 for reason in (self._seen, noted()) if reason]
        return max(codes, default=0)

    def agree(self) -> str | None:
        """The reason to stop that any rank has seen. A collective that waits, for outside the hot
        path: before the first step, say."""
        import torch

        from selfsight.distributed import collectives

        code = collectives.all_reduce_max(torch.tensor(float(self.code)))
        return self.follow(REASONS[int(code) - 1] if code else None)

    def follow(self, reason: str | None) -> str | None:
        """Take over what all ranks agreed on; a stop file that led to it is removed."""
        self.agreed = self.agreed or reason
        if self.agreed == "stop file" and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        return self.agreed

    def close(self) -> None:
        """Give Ctrl-C back to whom it belonged. USR2 and TERM stay noted: a job that ends anyway
        must not be killed by them while it does."""
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
            self._interrupt = None


@dataclass(frozen=True)
class Answer:
    """What all ranks know about one update; equal on all of them but for `own` and `note`."""

    step: int
    bad: bool
    """A loss or a gradient of some rank was not finite: no rank made the update."""
    bad_loss: bool
    """The loss of some rank was not finite."""
    loss: float
    """Mean of the finite losses over the ranks; NaN without one."""
    reason: str | None
    """To stop, one of `REASONS`."""
    own: bool
    """It was this rank whose numbers were not finite."""
    note: Any
    """What `exchange` was given along."""


class Flags:
    """The one small all-reduce of every step: six float32 numbers, summed.

    They are: ranks whose numbers are not finite; the sum of finite losses; ranks with a finite
    loss; ranks that saw each of `REASONS`.

    Args:
        stop: this rank's wish to stop.
        device: where losses are. On CUDA answers come one step late, elsewhere at once.
    """

    def __init__(self, stop: StopRequest, device: torch.device) -> None:
        import torch

        self._stop, self._device = stop, device
        self._codes = torch.cat([torch.zeros(1, 3), torch.eye(3)]).to(device)
        self._late = device.type == "cuda"
        self._waiting: deque[tuple[int, Any, Tensor, Any]] = deque()
        self._free: list[Tensor] = []

    def exchange(self, step: int, finite: Tensor, loss: Tensor, note: Any = None) -> Tensor:
        """Whether this update must be left out: float32 scalar on the device, 1 where any rank's
        numbers are not finite, else 0. A collective.

        Args:
            step: number of the update.
            finite: bool scalar, whether this rank's loss and gradients all are.
            loss: scalar, of this rank.
            note: kept for the answer, e.g. the batch's positions.
        """
        import torch

        from selfsight.distributed import collectives

        good = loss.isfinite()
        bad = ~(finite & good)
        value = torch.where(good, loss.detach().float().clamp(-1e30, 1e30), 0.0)
        own = torch.stack([bad.float(), value, good.float()])
        total = collectives.all_reduce_sum(torch.cat([own, self._codes[self._stop.code]]))
        whole = torch.cat([total, own[:1]])
        event = None
        if self._late:
            host = self._free.pop() if self._free else torch.empty(7, pin_memory=True)
            host.copy_(whole, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
            whole = host
        self._waiting.append((step, note, whole, event))
        return (total[0] > 0).float()

    def read(self) -> Answer | None:
        """The answer of the last `exchange`, on CUDA of the one before it (None at first)."""
        if len(self._waiting) < (2 if self._late else 1):
            return None
        return self._take()

    def drain(self) -> list[Answer]:
        """The answers not read yet, for the end of a run."""
        return [self._take() for _ in range(len(self._waiting))]

    def _take(self) -> Answer:
        from selfsight.distributed import collectives

        step, note, whole, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        bad, loss, good, *seen, own = whole.tolist()
        if event is not None:
            self._free.append(whole)
        reason = next((r for r, n in reversed(list(zip(REASONS, seen, strict=True))) if n), None)
        return Answer(
            step=step,
            bad=bad > 0,
            bad_loss=good < collectives.size(),
            loss=loss / good if good else float("nan"),
            reason=reason,
            own=own > 0,
            note=note,
        )
