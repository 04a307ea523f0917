"""Planted faults get their verdicts, with the step they began, and healthy runs none."""

import math
import random
from typing import Any

import pytest

from selfsight.heads.projection import ProjectionHead
from selfsight.methods.method import Now
from selfsight.methods.swav import SwAV
from selfsight.tracking.judge import GOOD, PATIENCE, Judge
from selfsight.trunks.regnet import RegNetY

EVERY = 10


def method(**more: Any) -> SwAV:
    trunk = RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)
    head = ProjectionHead(widths=[trunk.width, 16, 8])
    return SwAV(trunk=trunk, head=head, prototypes=[40], freeze_prototypes_steps=0, **more)


def line(seed: int, n: int) -> dict[str, float]:
    """The figures of a healthy run's n-th line: a noisy fall from ln 40."""
    noise = random.Random(seed * 1000 + n).gauss(0, 0.02)
    return {
        "loss": 2.2 + 1.45 * math.exp(-n / 20) + noise,
        "assignment_entropy": 2.5,
        "feature_spread": 0.6,
        "prototypes_used": 0.8,
        "data_wait": random.Random(seed + n).uniform(0, 0.4),
        "images_per_second": 100.0,
    }


def run(judge: Judge, change: Any = None, seed: int = 0, lines: int = 60, **more: Any) -> list[str]:
    """States after each line; `change(n, figures)` plants a fault."""
    subject, states = method(**more), []
    for n in range(lines):
        figures = line(seed, n)
        if change:
            change(n, figures)
        judge.observe(subject, figures, Now(n * EVERY + EVERY - 1, None), 0, EVERY)
        states.append(judge.verdict.state)
    return states


@pytest.mark.parametrize("seed", range(10))
def test_healthy_runs_get_no_bad_verdict(seed):
    judge = Judge(warm_until=100)
    judge.evaluated(0, {"knn_top1": 20.0}, initial=True)
    for n in range(5):
        judge.evaluated(200 + 100 * n, {"knn_top1": 20.5 + 3 * n}, initial=False)
    assert set(run(judge, seed=seed)) <= set(GOOD)
    assert not judge.history


def test_a_spike_is_told_at_once_and_passes():
    def spike(n, figures):
        figures["loss"] += 3.0 * (n in (40, 41))

    judge = Judge(warm_until=50)
    states = run(judge, spike)
    assert states[39:43] == ["healthy", "loss spike", "loss spike", "healthy"]
    assert judge.history[0]["since"] == 40 * EVERY + EVERY
    assert "likely cause" in judge.history[0]["text"]
    assert len(judge.history) == 1


def test_a_jump_as_the_queue_joins_is_the_queues():
    def jump(n, figures):
        figures["loss"] += 1.2 * (n >= 30)

    judge = Judge(warm_until=50)
    states = run(judge, jump, queue_length=80, queue_start_step=300, lines=40)
    assert states[30] == "queue too early"
    assert judge.since == 310 and "raise method.queue_start_step" in judge.text
    again = Judge(warm_until=50)
    assert run(again, jump, lines=40)[30] == "loss spike", "without a queue it is a spike"


def test_a_queue_of_untrained_features_is_named():
    def stuck(n, figures):
        figures.update(loss=math.log(40), assignment_entropy=math.log(40))

    assert run(Judge(warm_until=0), stuck, queue_length=80)[-1] == "queue too early"
    assert run(Judge(warm_until=0), stuck)[-1] == "uniform collapse"


def test_starving_is_told_when_it_lasts():
    def starve(n, figures):
        figures["data_wait"] = 0.9 if n >= 20 or n == 10 else 0.1

    judge = Judge(warm_until=50)
    states = run(judge, starve, lines=30)
    assert states[10] == "healthy" and states[20 + PATIENCE - 2] == "healthy"
    assert states[20 + PATIENCE - 1] == "data starved"
    assert judge.since == 20 * EVERY + EVERY
    assert "loader.workers" in judge.text and "90%" in judge.text


def test_flat_knn_is_told_and_its_rise_takes_it_back():
    """Shuffled labels: the loss falls, and k-NN stays where chance puts it."""
    judge = Judge(warm_until=100)
    judge.evaluated(0, {"knn_top1": 10.3}, initial=True)
    judge.evaluated(90, {"knn_top1": 10.0}, initial=False)  # still warming up
    judge.evaluated(150, {"knn_top1": 9.8}, initial=False)
    assert run(judge, lines=25)[-1] == "healthy"
    judge.evaluated(200, {"knn_top1": 10.6}, initial=False)
    assert run(judge, lines=25)[-1] == "not learning"
    assert judge.since == 150 and "10.3 % at random initialisation" in judge.text
    judge.evaluated(250, {"knn_top1": 14.0}, initial=False)
    assert run(judge, lines=25)[-1] == "healthy"


def test_the_summary_tells_the_history():
    judge = Judge(warm_until=0)
    run(judge, lambda n, f: f.update(feature_spread=0.0 if n > 20 else 0.5), lines=30)
    summary = judge.summary()
    assert summary["verdict"] == "one-point collapse" and summary["verdict_since"] == 220
    assert summary["verdicts"][0]["declared"] == (21 + PATIENCE) * EVERY
