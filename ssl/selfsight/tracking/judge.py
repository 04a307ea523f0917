"""The state of a run in words, with the step it began."""

from collections.abc import Mapping

from selfsight.methods.method import Method, Now, Verdict

PATIENCE = 3  # log lines in a row before a bad state is declared


class Judge:
    """Turns the figures of log lines into a verdict that does not flicker.

    Args:
        warm_until: Step before which learning is not expected to show: the run is `warming up`
            unless its numbers are not finite.
    """

    def __init__(self, *, warm_until: int) -> None:
        self.warm_until = warm_until
        self.verdict = Verdict("warming up", "no figures yet")
        self.since = 0
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
        if new_skips:
            seen = Verdict(
                "not finite",
                f"{new_skips} of the last {updates} updates were left out: a loss or gradient was "
                "not finite",
                "lower schedule.base_lr, set clip_gradients, or use precision=bf16 or fp32",
            )
            # under fp16 a lone skip is loss scaling at work
            urgent = new_skips == updates
        else:
            seen = method.diagnose(figures, now)
            urgent = False
        warming = now.step < self.warm_until and not new_skips
        if warming and seen.state != "healthy":
            seen = Verdict("warming up", seen.sentence)
        if self._candidate is None or seen.state != self._candidate.state:
            self._candidate_since, self._lines = now.step + 1, 0
        self._candidate, self._lines = seen, self._lines + 1
        settled = urgent or seen.state in ("healthy", "warming up") or self._lines >= PATIENCE
        if not settled:
            if self.verdict.state == "warming up":
                self.verdict = Verdict("warming up", seen.sentence)
            return False
        changed = seen.state != self.verdict.state
        if changed:
            self.since = self._candidate_since
        self.verdict = seen
        return changed

    @property
    def text(self) -> str:
        """The verdict as one line."""
        remedy = f"; {self.verdict.remedy}" if self.verdict.remedy else ""
        since = f" (since step {self.since})" if self.since else ""
        return f"{self.verdict.state}{since}: {self.verdict.sentence}{remedy}"
