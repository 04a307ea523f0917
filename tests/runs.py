"""Small whole runs for tests: pictures on disk, a configuration, a launch in this process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from selfsight.build import compose
from selfsight.cluster.local import launch
from selfsight.config import check
from selfsight.distributed import preempt
from selfsight.methods.method import Method
from selfsight.train import pretrain

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
CLOCKS = ("images_per_second", "data_wait", "seconds", "memory_gb")

REGNET = ["model=regnety_tiny", "model.trunk.depth=5", "model.trunk.w_0=8", "model.trunk.w_a=12.0"]
REGNET += ["model.trunk.w_m=2.0", "model.trunk.group_width=8", "model.trunk.stem_width=8"]
REGNET += ["model.head.widths=[64,32,16]"]
VIT = ["model=vit_tiny", "model.trunk.width=32", "model.trunk.depth=4", "model.trunk.heads=2"]
VIT += ["model.trunk.image_size=32", "model.trunk.patch_size=8", "model.head.widths=[32,32,16]"]
SMALL = [
    "data=folder",
    "views.global.size=32",
    "views.local.size=16",
    "views.local.count=2",
    "method.prototypes=[40]",
    "method.freeze_prototypes_steps=2",
    "schedule.lr.warmup_steps=2",
    "batch_size=8",
    "epochs=null",
    "steps=8",
    "device=cpu",
    "cluster.threads=1",
    "loader.workers=0",
    "tracking.log_every=2",
    "tracking.wandb=off",
    "data.eval_limit=[16,8]",
    "data.eval_size=32",
]


def pictures(folder: Path, classes: int = 3, each: int = 9, seed: int = 0) -> Path:
    """A folder of small PNG files, one sub-folder a class."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (24, 36, 3)) // 2 + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02d}.png")
    return folder


def arguments(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    """The command line of a small run; of a RegNetY unless another model is named."""
    model = [] if any(m.startswith("model=") for m in more) else REGNET
    place = [] if any(m.startswith("cluster=") for m in more) else ["cluster=local"]
    return [*SMALL, *model, *place, f"data.path={data}", f"runs_dir={runs}", f"name={name}", *more]


def run_here(overrides: list[str]) -> dict[str, Any]:
    """Run in this process (its ranks in others); returns the summary."""
    config = check(compose("pretrain", overrides))
    try:
        return launch(config, config.name, pretrain)
    finally:
        torch.use_deterministic_algorithms(False)
        preempt.disarm()  # or TERM would never end pytest


def spoil_pixels(monkeypatch: "pytest.MonkeyPatch", kind: type[Method], step: int) -> None:
    """Have the pixels of one update not be finite, in runs of a method in this process."""
    forward, normalize = kind.forward, kind.normalize_pixels
    spoils = False

    def broken(self, batch, now, plan=None):
        nonlocal spoils
        spoils = now.step == step
        try:
            return forward(self, batch, now, plan)
        finally:
            spoils = False

    def normalized(self, images):
        return normalize(self, images) * (float("nan") if spoils else 1.0)

    monkeypatch.setattr(kind, "forward", broken)
    monkeypatch.setattr(kind, "normalize_pixels", normalized)


def start(overrides: list[str]) -> subprocess.Popen[str]:
    """Start the command as a user would."""
    return subprocess.Popen(
        [sys.executable, "launch/pretrain.py", *overrides],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(overrides: list[str], timeout: float = 240) -> tuple[int, str, str]:
    """Run the command; exit status, stdout, stderr."""
    process = start(overrides)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def kill_after_step(overrides: list[str], metrics: Path, step: int, timeout: float = 240) -> int:
    """Start the command and `kill -9` it once its metrics tell of `step`; returns the step seen."""
    process = start(overrides)
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            seen = max((line["step"] for line in read_lines(metrics)), default=-1)
            if seen >= step:
                return seen
            if process.poll() is not None:
                raise AssertionError(f"it ended by itself: {process.communicate()}")
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached in {timeout} s")
    finally:
        process.kill()
        process.communicate()


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, without what clocks measured."""
    if not metrics.is_file():
        return []
    lines = [line for line in metrics.read_text().split("\n")[:-1] if line.endswith("}")]
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def checksums(run: Path, step: int) -> dict[str, str]:
    """The checksum of every file of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}
