"""The state of a run in words, with the step it began."""

from collections.abc import Mapping
from typing import Any

from selfsight.methods.method import Method, Now, Verdict
from selfsight.tracking.symptoms import Symptoms

PATIENCE = 3  # log lines in a row before a bad state is declared
GOOD = ("healthy", "warming up")


class Judge:
    """Turns the figures of log lines into a verdict that does not flicker.

    Args:
        warm_until: Step before which learning is not expected to show: the run is `warming up`
            unless its numbers are not finite.

    Attributes:
        verdict: the state now.
        since: the step it began.
        history: the bad states so far: {state, since, declared, text}.
    """

    def __init__(self, *, warm_until: int) -> None:
        self.warm_until = warm_until
        self.verdict = Verdict("warming up", "no figures yet")
        self.since = 0
        self.history: list[dict[str, Any]] = []
        self._symptoms = Symptoms()
        self._candidate: Verdict | None = None
        self._candidate_since = 0
        self._lines = 0

    def observe(
        self, method: Method, figures: Mapping[str, float], now: Now, new_skips: int, updates: int
    ) -> bool:
        """Take one log line's figures; returns whether the verdict's state changed.

        Args:
            new_skips: Updates skipped since the last line because a number was not finite.
            updates: Updates since the last line.
        """
        warming = now.step < self.warm_until and not new_skips
        first = now.step + 1
        # under fp16 a lone skip is loss scaling at work
        urgent = bool(new_skips) and new_skips == updates
        if new_skips:
            seen = Verdict(
                "not finite",
                f"{new_skips} of the last {updates} updates were left out: a loss or gradient was "
                "not finite",
                "lower schedule.base_lr, set clip_gradients, or use precision=bf16 or fp32",
                "numbers too large for the precision, or too large a step",
            )
        else:
            seen = method.diagnose(figures, now)
            spike = self._symptoms.spike(figures["loss"]) if "loss" in figures else None
            if spike is not None:
                begun = self._candidate_since if self._is("loss spike") else first
                seen = method.explain_spike(begun) or spike
                urgent = not warming
            elif seen.state in GOOD and (starved := self._symptoms.starved(figures)):
                seen = starved
            elif seen.state in GOOD and (flat := self._symptoms.flat(self.warm_until)):
                first, seen = flat
                urgent = True  # several evaluations have said so
        if warming and seen.state != "healthy":
            seen = Verdict("warming up", seen.sentence)
        if self._candidate is None or seen.state != self._candidate.state:
            self._candidate_since, self._lines = first, 0
        self._candidate, self._lines = seen, self._lines + 1
        settled = urgent or seen.state in GOOD or self._lines >= PATIENCE
        if not settled:
            if self.verdict.state == "warming up":
                self.verdict = Verdict("warming up", seen.sentence)
            return False
        changed = seen.state != self.verdict.state
        if changed:
            self.since = self._candidate_since
        self.verdict = seen
        if changed and not self.good:
            entry = {"state": seen.state, "since": self.since, "declared": now.step + 1}
            self.history.append({**entry, "text": self.text})
        return changed

    def evaluated(self, step: int, figures: Mapping[str, float], *, initial: bool) -> None:
        """Take an evaluation's figures."""
        if "knn_top1" in figures:
            self._symptoms.evaluated(step, figures["knn_top1"], initial)

    def forget(self, why: str) -> None:
        """The run went back to an earlier state, which has to show itself anew."""
        self.verdict, self.since = Verdict("warming up", why), 0
        self._candidate, self._lines = None, 0
        self._symptoms.forget()

    def _is(self, state: str) -> bool:
        return self._candidate is not None and self._candidate.state == state

    @property
    def good(self) -> bool:
        """Whether there is nothing to be done."""
        return self.verdict.state in GOOD

    def summary(self) -> dict[str, Any]:
        """What summary.json holds of it."""
        return {
            "verdict": self.verdict.state,
            "verdict_text": self.text,
            "verdict_since": self.since,
            "verdicts": self.history,
        }

    @property
    def text(self) -> str:
        """The verdict as one line."""
        cause = f"; likely cause: {self.verdict.cause}" if self.verdict.cause else ""
        remedy = f"; {self.verdict.remedy}" if self.verdict.remedy else ""
        since = f" (since step {self.since})" if self.since else ""
        return f"{self.verdict.state}{since}: {self.verdict.sentence}{cause}{remedy}"
