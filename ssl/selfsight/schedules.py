"""Schedules: values that change with the step.

All are pure functions of the step but `Plateau`, which depends on the loss as well and is saved
with the run. Steps are optimiser steps, counted from 0; a schedule of n steps reaches its end at
step n, right after its last update, and stays there.

Sources: linear warm-up, Goyal et al. 2017 (arXiv:1706.02677); cosine, Loshchilov and Hutter 2016
(arXiv:1608.03983), without restarts; warm-up, then a constant rate that halves when the loss stops
falling, SEER (arXiv:2103.01988), whose run of unknown length could not use a cosine.

Our cosine begins where the warm-up ends, at the peak, as in SwAV's own code. VISSL evaluates it on
the progress of the whole run, so that its rate jumps down when the warm-up is over (9.6 to 9.50
in SEER).
"""

import math
from collections.abc import Sequence


def constant(step: float, *, value: float) -> float:
    """`value` at every step."""
    del step
    return value


def cosine(step: float, *, start: float, end: float, steps: int | None) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`.

    Raises:
        ValueError: `steps` is None, as in a run without end.
    """
    return warmup_cosine(step, start=start, peak=start, end=end, warmup_steps=0, steps=steps)


def warmup_constant(step: float, *, start: float, peak: float, warmup_steps: float) -> float:
    """A line from `start` at step 0 to `peak` at step `warmup_steps`, then `peak`."""
    if step >= warmup_steps:
        return peak
    return start + (peak - start) * step / warmup_steps


def warmup_cosine(
    step: float,
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: float,
    steps: int | None,
) -> float:
    """A line from `start` to `peak` over `warmup_steps`, then half a cosine to `end` at `steps`.

    Raises:
        ValueError: `steps` is None, as in a run without end, or less than the warm-up.
    """
    if steps is None:
        raise ValueError("a cosine needs an end: set steps, or use schedule=warmup_plateau")
    if warmup_steps > steps:
        raise ValueError(
            f"the warm-up of {warmup_steps} steps is longer than the run of {steps}: "
            "lower warmup_steps or raise steps"
        )
    if step < warmup_steps:
        return warmup_constant(step, start=start, peak=peak, warmup_steps=warmup_steps)
    if step >= steps:
        return end
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_steps_down(
    step: float,
    *,
    start: float,
    peak: float,
    factor: float,
    milestones: Sequence[float],
    warmup_steps: float,
    steps: int | None,
) -> float:
    """A line from `start` to `peak`, which is multiplied by `factor` at each of the `milestones`,
    shares of the run (VISSL's and torchvision's steps).

    Raises:
        ValueError: `steps` is None, as in a run without end.
    """
    if steps is None:
        raise ValueError("milestones are shares of the run, which needs an end: set steps")
    # a millionth of a step forgives the rounding of 30 / 35
    passed = sum(step + 1e-6 >= share * steps for share in milestones)
    lowered = peak * factor**passed
    if passed == 0:
        return warmup_constant(step, start=start, peak=peak, warmup_steps=warmup_steps)
    return lowered


def warmup_exponential(
    step: float,
    *,
    start: float,
    peak: float,
    factor: float,
    every: float,
    warmup_steps: float,
) -> float:
    """A line from `start` to `peak` over `warmup_steps`, then multiplied by `factor` after every
    `every` steps, smoothly."""
    if step < warmup_steps:
        return warmup_constant(step, start=start, peak=peak, warmup_steps=warmup_steps)
    return peak * factor ** ((step - warmup_steps) / every)


class Plateau:
    """A linear warm-up, then a constant value that is halved whenever the loss stops falling.

    The loss is smoothed by an exponential average over steps. When the average has not fallen
    below its best value by the share `threshold` for `patience` steps, the value is multiplied by
    `factor`, down to `minimum`, and the wait begins anew. All ranks must observe the same loss
    (reduced over ranks), and thus hold the same state.

    Args:
        start: value at step 0.
        peak: value from step `warmup_steps` on, until the first reduction.
        warmup_steps: length of the warm-up; losses seen during it are smoothed, not judged.
        patience: steps without progress before a reduction, counted from the end of the warm-up,
            the last progress or the last reduction.
        factor: of a reduction.
        minimum: the value is not lowered further.
        smoothing: time constant of the average, in steps: a loss `smoothing` steps old has 1/e of
            the weight of a new one.
        threshold: share of the best loss by which a new one must be lower to count as progress.

    Raises:
        ValueError: a patience, smoothing or factor that cannot be.
    """

    def __init__(
        self,
        *,
        start: float,
        peak: float,
        warmup_steps: int,
        patience: int,
        factor: float = 0.5,
        minimum: float = 0.0,
        smoothing: float = 100.0,
        threshold: float = 1e-3,
    ) -> None:
        if not (patience > 0 and smoothing > 0 and 0 < factor < 1):
            raise ValueError(
                "a plateau schedule needs patience and smoothing above 0 and a factor between "
                f"0 and 1, not {patience}, {smoothing} and {factor}"
            )
        self.start, self.peak, self.warmup_steps = start, peak, warmup_steps
        self.patience, self.factor, self.minimum = patience, factor, minimum
        self.smoothing, self.threshold = smoothing, threshold
        self.reductions = 0
        self.smoothed: float | None = None
        self.best: float | None = None
        self.last_step = 0
        self.waiting_since = warmup_steps

    def value(self, step: float) -> float:
        """The value at `step`, with the reductions so far."""
        lowered = max(self.peak * self.factor**self.reductions, min(self.minimum, self.peak))
        return warmup_constant(step, start=self.start, peak=lowered, warmup_steps=self.warmup_steps)

    __call__ = value

    def observe(self, step: int, loss: float) -> None:
        """Take note of the loss at `step`; later steps only, at any distance.

        A loss that is not finite is passed over: such a step changed no weight.
        """
        if not math.isfinite(loss):
            return
        if self.smoothed is None:
            self.smoothed = loss
        else:
            assert step > self.last_step, (step, self.last_step)
            weight = -math.expm1((self.last_step - step) / self.smoothing)
            self.smoothed += weight * (loss - self.smoothed)
        self.last_step = step
        if step < self.warmup_steps:
            return
        if self.best is None or self.smoothed < self.best - self.threshold * abs(self.best):
            self.best = self.smoothed
            self.waiting_since = step
        elif step - self.waiting_since >= self.patience:
            self.waiting_since = step
            if self.peak * self.factor**self.reductions > self.minimum:
                self.reductions += 1

    def state_dict(self) -> dict[str, float | int | None]:
        """What changes during a run, as plain numbers (None: nothing observed yet)."""
        return {
            "reductions": self.reductions,
            "smoothed": self.smoothed,
            "best": self.best,
            "last_step": self.last_step,
            "waiting_since": self.waiting_since,
        }

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Continue from a `state_dict`."""
        assert state.keys() == self.state_dict().keys(), sorted(state)
        for name, value in state.items():
            setattr(self, name, value)
