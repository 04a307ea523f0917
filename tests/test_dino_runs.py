"""Whole runs of DINO and iBOT: killed and resumed, on two ranks, accumulated, with bad numbers."""

from pathlib import Path

import pytest
import torch

from selfsight.methods.dino import DINO
from tests.runs import (
    checksums,
    kill_after_step,
    pictures,
    read_lines,
    run_command,
    run_here,
    spoil_pixels,
)
from tests.test_train import difference, state

SIZES = ["model=vit_tiny", "model.trunk.width=32", "model.trunk.depth=4", "model.trunk.heads=2"]
SIZES += ["model.trunk.image_size=32", "model.trunk.patch_size=8", "method.head.hidden=24"]
SIZES += ["method.head.bottleneck=16", "method.head.prototypes=40", "views.local.size=16"]
SIZES += ["views.global.size=32", "views.local.count=2", "method.freeze_last_layer_steps=2"]
# the rest of what tests.runs.SMALL says of SwAV
REST = ["data=folder", "schedule.warmup_steps=2", "batch_size=8", "epochs=null", "steps=8"]
REST += ["device=cpu", "cluster.threads=1", "loader.workers=0", "tracking.log_every=2"]
REST += ["tracking.wandb=off", "data.eval_limit=[16,8]", "data.eval_size=32"]
DINO_ = ["method=dino", *SIZES, "method.teacher_momentum=0.9"]
IBOT_ = ["method=ibot", *SIZES, "model.trunk.mask_token=true", "method.patch_head=${method.head}"]
NO_DRAWS = ["model.trunk.drop_path=0", "method.koleo_weight=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


def command(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    place = [] if any(m.startswith("cluster=") for m in more) else ["cluster=local"]
    return [*REST, *place, f"data.path={data}", f"runs_dir={runs}", f"name={name}", *more]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param([*DINO_, "model.trunk.drop_path=0.2"], id="dino"),
        pytest.param([*IBOT_, "images_per_device=4"], id="ibot", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(data, tmp_path, method):
    """kill -9, resumed with another number of loader workers: student, teacher, centre, moments,
    cursors and metrics are equal bit for bit."""
    more = [*method, "steps=14", "checkpoint.every=2", "eval.every=12", "precision=bf16"]
    run_here(command(data, tmp_path, "whole", *more))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kill_after_step(command(data, tmp_path, "killed", *more, "loader.workers=1"), metrics, 8)
    status, _, said = run_command(command(data, tmp_path, "killed", *more))
    assert status == 0, said
    assert "continuing" in said
    found = checksums(tmp_path / "killed", 14)
    assert found and found == checksums(tmp_path / "whole", 14)
    assert read_lines(metrics) == read_lines(tmp_path / "whole" / "metrics.jsonl")
    saved = state(tmp_path, "whole", 14)
    assert saved["method/targets.centre"].any() == ("method=dino" in method)
    teacher = saved["method/trunk.blocks.0.attn.qkv.weight"]
    assert not torch.equal(teacher, saved["method/student_trunk.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param([*DINO_, "method.koleo_weight=0"], id="dino"),
        pytest.param([*IBOT_, *NO_DRAWS], id="ibot", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_rank_are_accumulation(data, tmp_path, method):
    more = [*method, "steps=4", "tracking.log_every=1"]
    run_here(command(data, tmp_path, "one", *more))
    run_here(command(data, tmp_path, "two", *more, "cluster.processes=2"))
    run_here(command(data, tmp_path, "parts", *more, "images_per_device=2"))
    one = state(tmp_path, "one", 4)
    losses = {
        name: [x["loss"] for x in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in x]
        for name in ("one", "two", "parts")
    }
    for name in ("two", "parts"):
        other = state(tmp_path, name, 4)
        assert torch.equal(one["stream/cursors"], other["stream/cursors"])
        # Adam's steps do not know how small a gradient is, so rounding shows in its own place
        names = [k for k in one if not k.startswith("optimizer/")]
        assert difference({k: one[k] for k in names}, {k: other[k] for k in names}) < 2e-3
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)


def test_what_is_exported_is_the_teacher(data, tmp_path, capsys):
    from safetensors import safe_open

    summary = run_here(command(data, tmp_path, "one", *DINO_, "steps=3"))
    saved = state(tmp_path, "one", 3)
    with safe_open(tmp_path / "one" / "trunk.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  (a file handle, not a mapping)
            assert torch.equal(file.get_tensor(key), saved[f"method/trunk.{key}"])
    assert not [k for k in saved if k.startswith("optimizer/trunk.")]
    assert summary["status"] == "complete"
    said = capsys.readouterr().err
    assert "teacher at 8 images an update: momentum 0.9 -> 1, temperature 0.04" in said


def test_numbers_that_are_not_finite_reach_neither_student_nor_teacher(data, tmp_path, monkeypatch):
    bad_step = 3
    spoil_pixels(monkeypatch, DINO, bad_step)
    more = [*DINO_, "steps=5", "checkpoint.every=1", "checkpoint.keep=9"]
    summary = run_here(command(data, tmp_path, "bad", *more))
    before, after = state(tmp_path, "bad", bad_step), state(tmp_path, "bad", bad_step + 1)
    learnt = [k for k in before if k.startswith(("optimizer/", "method/"))]
    assert len(learnt) > 20
    assert all(torch.equal(before[k], after[k]) for k in learnt)
    last = state(tmp_path, "bad", 5)
    assert all(torch.isfinite(v).all() for v in last.values())
    assert not torch.equal(last["method/trunk.norm.weight"], after["method/trunk.norm.weight"])
    assert summary["skipped_updates"] == 1


def test_a_longer_run_goes_on_with_what_follows_from_its_length(data, tmp_path):
    """Warm-ups follow from the number of updates, which may change, unless given by hand."""
    more = [m for m in DINO_ if "freeze" not in m]
    run_here(command(data, tmp_path, "one", *more, "steps=3"))
    assert run_here(command(data, tmp_path, "one", *more, "steps=5"))["step"] == 5
    with pytest.raises(ValueError, match=r"method\.freeze_last_layer_steps"):
        run_here(command(data, tmp_path, "one", *DINO_, "steps=6"))
