"""What to do about numbers that are not finite and losses that jump: skip, go back, or give up.

An update whose loss or gradient is not finite on any rank is made by no rank (the loop sees to
that). The guard counts such updates: after `after` in a row the state itself is taken for sick, and
the run goes back to its last checkpoint from before the trouble. The stream does not go back: what
was read since is skipped, so that the same batches are not met with the same weights again. That is
done at most `attempts` times, and then the run ends with a verdict.

Loss spikes are handled alike, by option: a finite loss far above the recent ones, in units of their
spread (median and median absolute deviation, so that spikes do not hide each other; 1.4826 makes it
the standard deviation of normal values).

The guard sees only what all ranks agree on, so all decide the same, and its state travels in the
checkpoint. Batches with such numbers are listed in `bad_batches.jsonl` in the run's folder.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsight.distributed import checkpoint, collectives
from selfsight.distributed.preempt import Answer

FILE = "bad_batches.jsonl"
LEAST_LOSSES = 16  # before a spike can be told
SCALE_SEARCH = 24  # updates in a row that a loss scaler may leave out: from 2**16 to below 1


@dataclass(frozen=True)
class Decision:
    """What to do after an update."""

    kind: str
    """`go on`, `roll back` or `stop`."""
    text: str = ""
    """A sentence for the console; at `stop`, the verdict."""
    before: int = 0
    """At `roll back`: the checkpoint must not be of a later step than this."""
    state: str = "not finite"
    """At `stop`: the verdict's name."""

    @property
    def rolls_back(self) -> bool:
        return self.kind == "roll back"

    @property
    def stops(self) -> bool:
        return self.kind == "stop"


GO_ON = Decision("go on")


class Guard:
    """Counts bad updates and decides.

    Args:
        after: so many bad updates in a row lead back.
        attempts: to go back, until `forgiven` good updates in a row wipe them out.
        spike: a loss so many robust standard deviations above the median of the last ones is bad;
            None: none is. The deviation is that of the noise: from the median step between
            neighbouring losses, so that a loss which falls steadily does not widen it.
        window: losses that the deviation is taken over.
        forgiven: see `attempts`.
        verdict: what a bad state of the run leads to: nothing (`go_on`), `stop`, or `roll_back` to
            before it began, as often as the attempts allow.
        scaling: whether a loss scaler looks for its scale by gradients that are not finite: those
            with a finite loss are then bad only once the search must have ended.
    """

    def __init__(
        self,
        *,
        after: int = 3,
        attempts: int = 3,
        spike: float | None = None,
        window: int = 128,
        forgiven: int = 1000,
        verdict: str = "go_on",
        scaling: bool = False,
    ) -> None:
        assert after >= 1
        assert attempts >= 0
        assert window >= LEAST_LOSSES
        self.after, self.attempts, self.spike = after, attempts, spike
        self.window, self.forgiven, self.scaling = window, forgiven, scaling
        self.verdict = verdict
        self.streak = 0
        self.first = 0  # update of the streak's first
        self.searching = 0  # gradients left out in a row by the scaler's search
        self.good = 0
        self.used = 0
        self.target: int | None = None  # step last gone back to
        self.losses: list[float] = []
        self.last = ""

    def observe(self, answer: Answer) -> Decision:
        """Take the answer about one update; every rank gives the same ones in the same order."""
        kind = self.kind(answer)
        if kind is None:
            self._take_good(answer)
            return GO_ON
        self.good = 0
        if not self.streak:
            self.first = answer.step
        self.streak += 1
        self.last = kind
        if self.streak < self.after:
            return GO_ON
        what = f"{kind} in {self.streak} updates in a row, from number {self.first} on"
        if self.used >= self.attempts:
            state = "loss spike" if kind.startswith("the loss") else "not finite"
            return Decision("stop", self._verdict(what), state=state)
        # A checkpoint that led here before may be sick itself: go behind it, if there is one.
        before = self.first if self.target is None else min(self.first, self.target - 1)
        return Decision("roll back", f"{what}: going back", max(0, before))

    def act_on(self, state: str, since: int, text: str) -> Decision:
        """What to do about a bad state of the run, told in words since a step."""
        if self.verdict == "go_on":
            return GO_ON
        if self.verdict == "roll_back" and self.used < self.attempts:
            return Decision("roll back", f"{text}: going back", max(0, since - 1))
        return Decision("stop", text, state=state)

    def kind(self, answer: Answer) -> str | None:
        """What is bad about an update; None if nothing is. It changes nothing."""
        if answer.bad:
            if self.scaling and not answer.bad_loss and self.searching < SCALE_SEARCH:
                return None
            return "a loss or gradient was not finite"
        if self.spike is not None and self._score(answer.loss) > self.spike:
            return "the loss was far above the recent ones"
        return None

    def rolled_back(self, step: int | None) -> None:
        """The run is at `step` again (None: there was no checkpoint, and it just goes on)."""
        self.used += 1
        self.target = step
        self.streak = self.searching = 0

    def _take_good(self, answer: Answer) -> None:
        if answer.bad:
            self.searching += 1
            return
        self.streak = self.searching = 0
        self.good += 1
        if self.good >= self.forgiven:
            self.used, self.target = 0, None
        if self.spike is not None:
            self.losses = [*self.losses, answer.loss][-self.window :]

    def _score(self, loss: float) -> float:
        if len(self.losses) < LEAST_LOSSES:
            return 0.0
        middle = statistics.median(self.losses[-LEAST_LOSSES:])
        # of the steps from loss to loss, in which a falling loss shows little
        steps = [abs(b - a) for a, b in itertools.pairwise(self.losses)]
        spread = 1.4826 / math.sqrt(2) * statistics.median(steps)
        return (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)

    def _verdict(self, what: str) -> str:
        went = f"after going back {self.used} times" if self.used else "and going back is off"
        if self.last.startswith("the loss"):
            remedy = "lower schedule.base_lr, lengthen the warm-up, or set clip_gradients"
        else:
            remedy = "lower schedule.base_lr, set clip_gradients, or use precision=bf16 or fp32"
        return f"{what}, {went}: the run ends; {remedy}, and look at the images in {FILE}"

    def state_dict(self) -> dict[str, Any]:
        """All that its decisions depend on beside its arguments, as plain values."""
        names = ("streak", "first", "searching", "good", "used", "target", "losses", "last")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over a `state_dict`."""
        for name in self.state_dict():
            setattr(self, name, state[name])
        self.losses = list(self.losses)


def record_bad_batch(
    folder: Path, answer: Answer, kind: str, names: Callable[[list[int]], list[str]] | None = None
) -> None:
    """Append one line to `bad_batches.jsonl`: {step, kind, ranks, positions}. A collective.

    `answer.note` is this rank's positions in the stream, a sequence of integers or a tensor. Where
    the ranks whose numbers were not finite are known, the positions are theirs, else of all. A
    batch that a resumed run meets again is not listed again.

    Args:
        folder: of the run.
        answer: about the update.
        kind: as `Guard.kind` gives it.
        names: gives the samples' names for positions of this rank; None leaves names out.
    """
    note = answer.note
    positions = [int(p) for p in (note.tolist() if hasattr(note, "tolist") else note or [])]
    every = collectives.all_gather_json([answer.own, positions, names(positions) if names else []])
    if collectives.rank() != 0:
        return
    ranks = [n for n, (own, *_) in enumerate(every) if own]
    chosen = [every[n] for n in ranks] or every
    line: dict[str, Any] = {"step": answer.step, "kind": kind, "ranks": ranks}
    line["positions"] = [p for _, own, _ in chosen for p in own]
    if names:
        line["samples"] = [name for *_, own in chosen for name in own]
    path = folder / FILE
    text = json.dumps(line) + "\n"
    written = path.read_text() if path.exists() else ""
    if text in written:
        return
    if written and not written.endswith("\n"):  # torn by a kill
        text = "\n" + text
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def choose(folder: Path, before: int, notice: Callable[[str], None] | None = None) -> Path | None:
    """The newest intact checkpoint of a step up to `before`, else the oldest intact one; None
    without any. One rank calls it.

    Args:
        folder: where the checkpoints lie.
        before: see `Decision`.
        notice: called with one sentence for each that is passed over because it is damaged.
    """
    paths = sorted(folder.glob("step_*"), key=_step) if folder.is_dir() else []
    paths = [path for path in paths if _step(path) is not math.inf]
    early = [path for path in paths if _step(path) <= before]
    late = [path for path in paths if _step(path) > before]
    for path in [*reversed(early), *late]:
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError as error:
            if notice:
                notice(f"{error}; this checkpoint is passed over.")
        else:
            return path
    return None


def _step(path: Path) -> float:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else math.inf
