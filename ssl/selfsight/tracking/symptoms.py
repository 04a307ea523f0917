"""States that any method's run may fall into, told from its log lines and evaluations alone."""

import itertools
import statistics
from collections.abc import Mapping

from selfsight.methods.method import Verdict

RECENT = 48  # log lines whose steps from one to the next say how much the loss varies
LEVEL = 5  # log lines whose median is the level before a spike
LEAST = 12  # lines before one can be told
SPIKE = 10.0  # robust standard deviations above the level
JUMP = 0.15  # and at least this share of it
STARVED = 0.7  # share of the time that the loop waits for data
FLAT_POINTS = 1.0  # k-NN must rise by so much above random initialisation
FLAT_EVALUATIONS = 2  # after the warm-up, before that can be told


class Symptoms:
    """Keeps what is needed of earlier lines: the recent losses and the k-NN figures."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._initial: float | None = None
        self._later: list[tuple[int, float]] = []

    def spike(self, loss: float) -> Verdict | None:
        """Whether the loss of a line is far above the recent ones. Such lines do not become part of
        what later ones are measured by."""
        held = self._losses
        if len(held) >= LEAST:
            middle = statistics.median(held[-LEVEL:])
            steps = [later - earlier for earlier, later in itertools.pairwise(held)]
            centre = statistics.median(steps)  # the slope: a falling loss varies no more for it
            spread = 1.4826 * statistics.median(abs(x - centre) for x in steps) / 2**0.5
            above = loss - middle
            if above > SPIKE * max(spread, 0.01 * abs(middle)) and above > JUMP * abs(middle):
                return Verdict(
                    "loss spike",
                    f"the loss is {loss:.3f}, and was {middle:.3f} before (median of "
                    f"{LEVEL} lines)",
                    "lower schedule.base_lr, lengthen the warm-up or set clip_gradients; "
                    "recovery.spike=20 goes back by itself",
                    "too large a step: the learning rate, or a batch unlike the others",
                )
        self._losses = [*held, loss][-RECENT:]
        return None

    def starved(self, figures: Mapping[str, float]) -> Verdict | None:
        """Whether the loop waits for data most of the time."""
        wait = figures.get("data_wait", 0.0)
        if wait <= STARVED:
            return None
        rate = figures.get("images_per_second", 0.0)
        return Verdict(
            "data starved",
            f"{wait:.0%} of the time goes by waiting for images ({rate:.0f} images/s)",
            "raise loader.workers or loader.prefetch, use loader.colour=device, or a faster disk; "
            "launch/inspect_data.py measures each stage",
            "reading and decoding are slower than the device",
        )

    def evaluated(self, step: int, top1: float, initial: bool) -> None:
        """Take the figure of an evaluation, in percent."""
        if initial:
            self._initial, self._later = top1, []
        else:
            self._later.append((step, top1))

    def flat(self, warm_until: int) -> tuple[int, Verdict] | None:
        """Whether k-NN has not risen since random initialisation, and since which step."""
        later = [(step, top1) for step, top1 in self._later if step > warm_until]
        if self._initial is None or len(later) < FLAT_EVALUATIONS:
            return None
        best = max(top1 for _, top1 in later)
        if best >= self._initial + FLAT_POINTS:
            return None
        return later[0][0], Verdict(
            "not learning",
            f"k-NN is flat: at best {best:.1f} % in {len(later)} evaluations, "
            f"{self._initial:.1f} % at random initialisation",
            "check the labels of the evaluation; where they are right, try a higher "
            "schedule.base_lr, larger crops (views.global.scale) or a longer run",
            "the labels do not belong to the images, or the features do not change for the better",
        )

    def forget(self) -> None:
        """The run went back: its recent losses were those of another state."""
        self._losses = []
        self._later = []
