"""Schedules at named points, and the plateau's judgement."""

import importlib
import inspect
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from selfsight.schedules import Plateau, constant, cosine, warmup_constant, warmup_cosine

CONF = Path(__file__).parents[1] / "conf"
SEER = {"start": 0.15, "peak": 9.6, "end": 0.0096, "warmup_steps": 8000, "steps": 122_070}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.15),
        (4000, (0.15 + 9.6) / 2),
        (7999, 9.6 - (9.6 - 0.15) / 8000),
        (8000, 9.6),
        (65_035, (9.6 + 0.0096) / 2),  # half of the way from 8,000 to 122,070
        (122_070, 0.0096),
        (200_000, 0.0096),
    ],
)
def test_seer(step: int, value: float):
    assert warmup_cosine(step, **SEER) == pytest.approx(value, rel=1e-12)


def test_seer_is_at_its_end_in_the_last_update():
    assert warmup_cosine(122_069, **SEER) == pytest.approx(0.0096, rel=1e-6)


def test_the_cosine_is_the_written_one_and_falls_throughout():
    values = [warmup_cosine(step, **SEER) for step in range(8000, 122_071, 10)]
    assert all(later < earlier for earlier, later in pairwise(values))
    for step in (8001, 30_000, 100_000):
        progress = (step - 8000) / (122_070 - 8000)
        expected = 0.0096 + 0.5 * (9.6 - 0.0096) * (1 + math.cos(math.pi * progress))
        assert warmup_cosine(step, **SEER) == pytest.approx(expected, rel=1e-12)


def test_no_warmup_and_nothing_but_warmup():
    assert warmup_cosine(0, start=1, peak=5, end=0, warmup_steps=0, steps=10) == 5
    only = {"start": 1.0, "peak": 5.0, "end": 0.5, "warmup_steps": 4, "steps": 4}
    assert [warmup_cosine(step, **only) for step in range(6)] == [1, 2, 3, 4, 0.5, 0.5]


def test_a_cosine_needs_an_end():
    with pytest.raises(ValueError, match="a cosine needs an end: set steps, or use schedule="):
        warmup_cosine(0, start=0.15, peak=9.6, end=0.0096, warmup_steps=8000, steps=None)
    with pytest.raises(ValueError, match="a cosine needs an end"):
        cosine(0, start=1, end=0, steps=None)


def test_a_warmup_longer_than_the_run_is_named():
    with pytest.raises(ValueError, match="warm-up of 8000 steps is longer than the run of 100"):
        warmup_cosine(0, **(SEER | {"steps": 100}))


def test_the_simple_ones():
    assert constant(7, value=0.3) == 0.3
    assert [cosine(step, start=0.04, end=0.4, steps=2) for step in (0, 1, 2, 3)] == pytest.approx(
        [0.04, 0.22, 0.4, 0.4]
    )
    temperature = {"start": 0.04, "peak": 0.07, "warmup_steps": 30}
    assert warmup_constant(0, **temperature) == 0.04
    assert warmup_constant(10, **temperature) == pytest.approx(0.05)
    assert warmup_constant(30, **temperature) == warmup_constant(1000, **temperature) == 0.07


def plateau(**changes) -> Plateau:
    options = {
        "start": 0.1,
        "peak": 1.0,
        "warmup_steps": 10,
        "patience": 20,
        "minimum": 0.2,
        "smoothing": 1e-3,  # no memory: each loss counts by itself
        "threshold": 0.01,
    }
    return Plateau(**(options | changes))


def test_plateau_warms_up_and_stays():
    schedule = plateau()
    assert [schedule.value(step) for step in (0, 5, 10, 10_000)] == pytest.approx(
        [0.1, 0.55, 1.0, 1.0]
    )
    assert schedule(5) == schedule.value(5)


def test_plateau_stays_while_the_loss_falls():
    schedule = plateau()
    for step in range(0, 1000, 5):
        schedule.observe(step, 10 * 0.97 ** (step / 5))
    assert schedule.value(1000) == 1.0


def test_plateau_halves_after_its_patience_and_again_down_to_the_minimum():
    schedule = plateau()
    values = {}
    for step in range(10, 200):
        schedule.observe(step, 5.0)
        values[step] = schedule.value(step)
    changes = [step for step in range(11, 200) if values[step] != values[step - 1]]
    assert changes == [30, 50, 70]  # progress was last seen at 10, the first judged step
    assert [values[step] for step in changes] == [0.5, 0.25, 0.2]
    assert values[199] == 0.2


def test_progress_below_the_threshold_is_none():
    schedule = plateau()
    for step in range(10, 31):
        schedule.observe(step, 5.0 - 0.002 * (step - 10))  # 0.8 % in all
    assert schedule.value(31) == 0.5
    schedule = plateau()
    for step in range(10, 31):
        schedule.observe(step, 5.0 - 0.006 * (step - 10))  # 2.4 % in all
    assert schedule.value(31) == 1.0


def test_losses_below_zero_are_judged_alike():
    schedule = plateau()
    for step in range(10, 100):
        schedule.observe(step, -1.0 - 0.01 * step)
    assert schedule.value(100) == 1.0


def test_smoothing_counts_steps_not_observations():
    dense, sparse = plateau(smoothing=50.0), plateau(smoothing=50.0)
    for schedule in (dense, sparse):
        schedule.observe(0, 8.0)
    for step in range(1, 101):
        dense.observe(step, 4.0)
    sparse.observe(100, 4.0)
    expected = 4.0 + 4.0 * math.exp(-100 / 50)
    assert dense.smoothed == pytest.approx(expected)
    assert sparse.smoothed == pytest.approx(expected)


def test_noise_is_smoothed_away():
    """A single lucky loss is no progress, and does not set a mark that nothing reaches again."""
    schedule = plateau(smoothing=50.0, patience=100)
    for step in range(10, 400, 2):
        noise = -3.0 if step == 20 else 0.5 * (-1) ** (step // 2)
        schedule.observe(step, 8.0 - 0.01 * step + noise)
    assert schedule.value(400) == 1.0


def test_a_loss_that_is_not_finite_is_passed_over():
    schedule = plateau()
    schedule.observe(10, 5.0)
    before = schedule.state_dict()
    schedule.observe(11, float("nan"))
    schedule.observe(12, float("inf"))
    assert schedule.state_dict() == before


def test_plateau_continues_from_its_state():
    losses = [5.0 - 0.05 * min(step, 60) for step in range(200)]
    whole = plateau(smoothing=5.0)
    for step, loss in enumerate(losses):
        whole.observe(step, loss)
    first = plateau(smoothing=5.0)
    for step in range(83):
        first.observe(step, losses[step])
    second = plateau(smoothing=5.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(83, 200):
        second.observe(step, losses[step])
    assert whole.reductions > 1
    assert second.state_dict() == whole.state_dict()
    assert second.value(200) == whole.value(200)
    fresh = plateau().state_dict()
    second.load_state_dict(json.loads(json.dumps(fresh)))
    assert second.state_dict() == fresh


def test_plateau_names_mistakes():
    with pytest.raises(ValueError, match="patience and smoothing above 0"):
        plateau(patience=0)


def resolved(name: str, **run) -> dict:
    """A schedule's yaml with the two resolvers of the run, written out here once more."""
    node = OmegaConf.create(
        {"batch_size": 256, "steps": 1000, "optim": {"weight_decay": 1e-6}}
        | {"schedule": OmegaConf.load(CONF / "schedule" / f"{name}.yaml")}
        | run
    )
    text = OmegaConf.to_yaml(node)
    peak = node.schedule.base_lr * node.batch_size / 256
    text = text.replace("${scale_lr:${schedule.base_lr},${batch_size}}", str(peak))
    for factor in (0.0625, 0.001):
        text = text.replace(
            "${multiply:${schedule.lr.peak}," + str(factor) + "}", str(peak * factor)
        )
    container = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert isinstance(container, dict)
    return container["schedule"]


@pytest.mark.parametrize("name", ["warmup_cosine", "warmup_plateau", "constant"])
def test_the_yaml_lists_every_argument(name: str):
    schedule = resolved(name, batch_size=4096)
    for key in ("lr", "weight_decay"):
        node = schedule[key]
        module, _, attribute = node.pop("_target_").rpartition(".")
        target = getattr(importlib.import_module(module), attribute)
        partial = node.pop("_partial_", False)
        parameters = set(inspect.signature(target).parameters) - ({"step"} if partial else set())
        assert set(node) == parameters
        value = target(400, **node) if partial else target(**node).value(400)
        assert 0 < value <= 4.8


def test_the_default_is_swav_at_its_own_batch():
    """arXiv:2006.09882: 4096 images, 0.3 -> 4.8, then down to 0.0048."""
    lr = resolved("warmup_cosine", batch_size=4096)["lr"]
    assert (lr["start"], lr["peak"], lr["end"]) == pytest.approx((0.3, 4.8, 0.0048))
