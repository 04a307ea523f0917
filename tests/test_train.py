"""Whole runs: killed and resumed, on two ranks, accumulated, with numbers that are not finite."""

import random
from pathlib import Path

import pytest
import torch

from selfsight.distributed import checkpoint
from selfsight.methods.swav import SwAV
from tests.runs import (
    VIT,
    arguments,
    checksums,
    kill_after_step,
    pictures,
    read_lines,
    run_command,
    run_here,
    spoil_pixels,
)

QUEUE = ["method.queue_length=16", "method.queue_start_step=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


def state(runs: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(runs / name / "checkpoints" / f"step_{step:08d}")
    return tensors


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any value, relative to the largest value of its tensor."""
    assert a.keys() == b.keys()
    return max(
        ((a[k].double() - b[k].double()).abs().max() / a[k].double().abs().max().clamp(1e-3)).item()
        for k in a
        if a[k].numel()
    )


def test_a_run_leaves_what_it_promises(data, tmp_path):
    summary = run_here(arguments(data, tmp_path, "one"))
    run = tmp_path / "one"
    assert summary["status"] == "complete"
    assert summary["step"] == 8
    assert summary["images_seen"] == 64
    assert summary["images_per_second"] > 0
    assert 0 <= summary["knn_top1"] <= 100
    assert 0 <= summary["knn_top1_random_init"] <= 100
    assert summary["verdict"] and summary["loss"] > 0
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "trunk.safetensors"):
        assert (run / name).stat().st_size > 0
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == [2, 4, 6, 8]
    from safetensors import safe_open

    with safe_open(run / "trunk.safetensors", "pt") as file:
        assert "selfsight.trunks.regnet.RegNetY" in file.metadata()["trunk"]
        saved = state(tmp_path, "one", 8)
        for key in file.keys():  # noqa: SIM118  (a file handle, not a mapping)
            assert torch.equal(file.get_tensor(key), saved[f"method/trunk.{key}"])


def test_killed_runs_end_with_the_bits_of_undisturbed_ones(data, tmp_path):
    """kill -9 at a random step, twice, resumed with other numbers of loader workers: weights,
    optimiser, queue, cursors and metrics are equal bit for bit."""
    more = [*QUEUE, "steps=24", "checkpoint.every=3", "eval.every=8", "precision=bf16"]
    run_here(arguments(data, tmp_path, "whole", *more))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kills = sorted(random.sample(range(2, 22), 2))  # 2 is before the first checkpoint
    for workers, step in zip((1, 2), kills, strict=True):
        killed = arguments(data, tmp_path, "killed", *more, f"loader.workers={workers}")
        kill_after_step(killed, metrics, step)
    status, _, said = run_command(arguments(data, tmp_path, "killed", *more))
    assert status == 0, said
    assert "continuing" in said or kills[-1] < 3, said
    assert checksums(tmp_path / "killed", 24) == checksums(tmp_path / "whole", 24), kills
    assert read_lines(metrics) == read_lines(tmp_path / "whole" / "metrics.jsonl"), kills


def test_two_ranks_are_one_rank_with_the_whole_batch(data, tmp_path):
    """BatchNorm synchronised over both, codes over both: same samples, losses and weights."""
    more = [*QUEUE, "steps=5", "tracking.log_every=1"]
    run_here(arguments(data, tmp_path, "one", *more))
    run_here(arguments(data, tmp_path, "two", *more, "cluster.processes=2"))
    one, two = state(tmp_path, "one", 5), state(tmp_path, "two", 5)
    assert torch.equal(one["stream/cursors"], two["stream/cursors"])
    # A bias just before a BatchNorm has no gradient but rounding, which LARS scales to a full step.
    idle = ("projection_head.0.bias", "projection_head.3.bias")
    names = [k for k in one if not any(word in k for word in idle)]
    assert difference({k: one[k] for k in names}, {k: two[k] for k in names}) < 1e-3
    for a, b in zip(*(_losses(tmp_path / n) for n in ("one", "two")), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_two_ranks_resume_bit_for_bit(data, tmp_path):
    more = [*QUEUE, "checkpoint.every=3", "cluster.processes=2"]
    run_here(arguments(data, tmp_path, "whole", *more, "steps=6"))
    kill_after_step(
        arguments(data, tmp_path, "killed", *more, "steps=6"),
        tmp_path / "killed" / "metrics.jsonl",
        3,
    )
    run_here(arguments(data, tmp_path, "killed", *more, "steps=6"))
    assert checksums(tmp_path / "killed", 6) == checksums(tmp_path / "whole", 6)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_accumulation_is_the_whole_batch_without_batchnorm(data, tmp_path, checkpointing):
    more = [*VIT, *QUEUE, "model.head.batch_norm=false", "steps=5", "tracking.log_every=1"]
    run_here(arguments(data, tmp_path, "whole", *more))
    parts = ["images_per_device=2", f"activation_checkpointing={checkpointing}"]
    run_here(arguments(data, tmp_path, "parts", *more, *parts))
    whole, accumulated = state(tmp_path, "whole", 5), state(tmp_path, "parts", 5)
    assert torch.equal(whole["stream/cursors"], accumulated["stream/cursors"])
    assert difference(whole, accumulated) < 1e-3
    for a, b in zip(*(_losses(tmp_path / n) for n in ("whole", "parts")), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_activation_checkpointing_changes_no_bit(data, tmp_path):
    run_here(arguments(data, tmp_path, "plain", "steps=4"))
    run_here(arguments(data, tmp_path, "saving", "steps=4", "activation_checkpointing=true"))
    assert checksums(tmp_path / "plain", 4) == checksums(tmp_path / "saving", 4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_numbers_that_are_not_finite_never_reach_the_weights(
    data, tmp_path, precision, monkeypatch
):
    """Pixels that are not finite at one step: that update is left out, counted, and told, and
    BatchNorm's running statistics are as before."""
    bad_step = 4
    spoil_pixels(monkeypatch, SwAV, bad_step)
    more = [*QUEUE, f"precision={precision}", "checkpoint.every=1", "checkpoint.keep=20"]
    summary = run_here(arguments(data, tmp_path, "bad", *more))
    before, after = state(tmp_path, "bad", bad_step), state(tmp_path, "bad", bad_step + 1)
    learnt = [k for k in before if k.startswith("optimizer/") or k == "method/queue"]
    learnt += [k for k in before if k.endswith((".weight", ".bias")) and "prototypes" not in k]
    learnt += [k for k in before if "running_" in k or "num_batches" in k]
    assert len(learnt) > 20
    assert all(torch.equal(before[k], after[k]) for k in learnt)
    last = state(tmp_path, "bad", 8)
    assert all(torch.isfinite(v).all() for v in last.values())
    assert not torch.equal(after["method/head.projection_head.0.weight"],
                           last["method/head.projection_head.0.weight"])  # fmt: skip
    if precision == "fp32":  # fp16 also skips while it looks for a loss scale
        assert summary["skipped_updates"] == 1


def test_fp16_finds_a_loss_scale_and_learns(data, tmp_path):
    summary = run_here(arguments(data, tmp_path, "half", "precision=fp16", "steps=6"))
    assert summary["status"] == "complete"
    assert summary["skipped_updates"] < 6


def test_endless_runs_stop_on_a_signal_and_go_on(data, tmp_path):
    import signal
    import time

    from tests.runs import start

    endless = ["steps=null", "schedule=warmup_plateau", "eval.every=1000"]
    command = [a for a in arguments(data, tmp_path, "endless") if not a.startswith("steps=")]
    process = start([*command, *endless])
    metrics = tmp_path / "endless" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not [x for x in read_lines(metrics) if "loss" in x] and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "goes on" in said
    newest = checkpoint.latest(tmp_path / "endless" / "checkpoints")
    assert newest is not None
    reached = checkpoint.verify(newest)["step"]
    ended = run_here([*command, f"steps={reached + 2}", "schedule=warmup_plateau"])
    assert ended["step"] == reached + 2


def test_without_labels_rank_and_uniformity_are_told(tmp_path):
    flat = tmp_path / "flat"
    pictures(tmp_path / "sorted")
    flat.mkdir()
    for number, file in enumerate(sorted((tmp_path / "sorted").rglob("*.png"))):
        file.rename(flat / f"{number}.png")
    summary = run_here(arguments(flat, tmp_path, "unlabelled", "steps=2"))
    assert "knn_top1" not in summary
    for key in ("rank", "rank_random_init", "uniformity", "uniformity_random_init"):
        assert isinstance(summary[key], float)


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def test_a_run_that_never_saved_begins_anew(data, tmp_path):
    more = ["steps=4", "checkpoint.at_end=false", "checkpoint.every=100"]
    run_here(arguments(data, tmp_path, "unsaved", *more))
    once = read_lines(tmp_path / "unsaved" / "metrics.jsonl")
    run_here(arguments(data, tmp_path, "unsaved", *more))
    assert read_lines(tmp_path / "unsaved" / "metrics.jsonl") == once
