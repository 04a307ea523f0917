from typing import Any

from selfsight.methods.method import Now, Verdict
from selfsight.tracking.judge import PATIENCE, Judge


class Diagnoses:
    """Stands where a method does, and says what it is told to."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)

    def diagnose(self, figures: Any, now: Now) -> Verdict:
        return Verdict(self.states.pop(0), "because")


def states(*seen: str, warm_until: int = 0, skips: dict[int, int] | None = None) -> list[str]:
    judge, method, verdicts = Judge(warm_until=warm_until), Diagnoses(*seen), []
    for line in range(len(seen)):
        judge.observe(method, {}, Now(line * 10, 1000), (skips or {}).get(line, 0), 10)  # pyright: ignore[reportArgumentType]
        verdicts.append(judge.verdict.state)
    return verdicts


def test_a_bad_state_is_declared_when_it_lasts():
    seen = ["healthy", "collapse", "healthy", *["collapse"] * PATIENCE]
    assert states(*seen) == ["healthy"] * (2 + PATIENCE) + ["collapse"]


def test_the_step_it_began_is_told():
    judge, method = Judge(warm_until=0), Diagnoses("healthy", *["collapse"] * PATIENCE)
    for line in range(1 + PATIENCE):
        judge.observe(method, {}, Now(line * 10 + 9, None), 0, 10)  # pyright: ignore[reportArgumentType]
    assert judge.since == 20
    assert judge.text == "collapse (since step 20): because"


def test_nothing_bad_is_declared_while_warming_up():
    assert states(*["collapse"] * 6, warm_until=40)[:4] == ["warming up"] * 4


def test_updates_that_are_all_skipped_are_told_at_once():
    found = states("healthy", "healthy", "healthy", skips={1: 10})
    assert found[1] == "not finite"


def test_a_lone_skip_is_no_state():
    assert states("healthy", "healthy", "healthy", skips={1: 1}) == ["healthy"] * 3
