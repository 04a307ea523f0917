"""Short runs over real sets, from shards and a packed file, where SELFSIGHT_DATA names them."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.runs import REGNET, read_lines, run_here

SHORT = ["steps=3", "images=null", "batch_size=8", "cluster.threads=1", "loader.workers=0"]
SHORT += ["data.eval_limit=[40,20]", "tracking.log_every=1", "tracking.wandb=off", "device=cpu"]


@pytest.fixture
def sets() -> Path:
    folder = os.environ.get("SELFSIGHT_DATA")
    if not folder:
        pytest.skip("SELFSIGHT_DATA is not set: no real images here")
    return Path(folder)


def test_caltech_shards_with_labels(sets, tmp_path):
    summary = run_here(
        [
            *REGNET,
            "recipe=caltech101_small",
            "data=labelled_shards",
            f"data.shards={sets}/caltech101/train-*.tar",
            f"data.val_shards={sets}/caltech101/val-000000.tar",
            f"runs_dir={tmp_path}",
            "name=caltech",
            *SHORT,
        ]
    )
    assert summary["status"] == "complete"
    assert 0 <= summary["knn_top1"] <= 100


def test_cifar_packed(sets, tmp_path):
    summary = run_here(
        [
            *REGNET,
            "recipe=cifar10_small",
            "data=packed_npz",
            f"data.path={sets}/cifar10/cifar10_jpeg.npz",
            f"runs_dir={tmp_path}",
            "name=cifar",
            *SHORT,
        ]
    )
    assert summary["status"] == "complete"
    assert all(torch.isfinite(torch.tensor(x["loss"])) for x in read_losses(tmp_path / "cifar"))


def test_an_uncurated_stream_lists_what_it_cannot_use(sets, tmp_path):
    """Every file that is no picture is in the ledger with a reason; the run goes on."""
    run_here(
        [
            *REGNET,
            "data=uncurated_stream",
            f"data.shards={sets}/uncurated/uncurated-000000.tar",
            "views.global.size=32",
            "views.local.size=16",
            "method.prototypes=[30]",
            f"runs_dir={tmp_path}",
            "name=uncurated",
            *SHORT,
            "batch_size=20",
            "steps=20",
            "epochs=null",
        ]
    )
    ledger = (tmp_path / "uncurated" / "ledger.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in ledger]
    described = json.loads((sets / "uncurated" / "dataset.json").read_text())["samples"]
    bad = sum(sample["outcome"] != "ok" for sample in described)
    keys = {line["key"] for line in listed}
    assert all(line["reason"] for line in listed)
    assert len(keys) == bad  # 400 samples drawn from 335 files: each was met


def read_losses(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
