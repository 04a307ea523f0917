"""Whole runs on images that are not RGB of 8 bits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from selfsight.config import ConfigError
from tests.runs import REGNET, VIT, arguments, checksums, run_here

GRAY = [
    f"views.{group}.{key}"
    for group in ("global", "local")
    for key in ("jitter_strengths=[0.8,0.8,0,0]", "gray=0")
]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Grey images of 16 bits that use a tenth of the range, as scanners write them."""
    random = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for n in range(24):
        values = random.integers(2000, 8000, (40, 48)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{n:02d}.png")
    return folder


@pytest.mark.parametrize("model", [REGNET, VIT])
def test_grey_images_of_16_bits(scans, tmp_path, model, monkeypatch):
    more = [*GRAY, "pixels.channels=1", "pixels.bits=16", "pixels.estimate=24", "seed=3"]
    if model is VIT:
        more.append("views.local.size=16")
    summary = run_here(arguments(scans, tmp_path, "run", *model, *more, "checkpoint.every=4"))
    assert summary["status"] == "complete" and np.isfinite(summary["loss"])
    run = tmp_path / "run"
    with safetensors.safe_open(run / "trunk.safetensors", "pt") as file:
        metadata = file.metadata()
    pixels, trunk = json.loads(metadata["pixels"]), json.loads(metadata["trunk"])
    assert pixels["channels"] == trunk["in_channels"] == 1 and pixels["bits"] == 16
    assert pixels["mean"][0] == pytest.approx(5000 / 65535, rel=0.02)
    assert pixels["std"][0] == pytest.approx(6000 / 12**0.5 / 65535, rel=0.05)
    # gone on with from the middle: the estimate is that of the start, from a checkpoint
    ended = checksums(run, 8)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    monkeypatch.setattr("selfsight.runtime.pixel_statistics", None)
    run_here(arguments(scans, tmp_path, "run", *model, *more, "checkpoint.every=4"))
    assert checksums(run, 8) == ended


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pixels.channels=1"], "pixels.mean has 3 values and pixels.channels=1: give one"),
        (["pixels.bits=12"], "pixels.bits=12 is not one of 8, 16"),
        (["loader.colour=device", "pixels.bits=16"], "loader.colour=device works on 8-bit RGB"),
    ],
)
def test_mistakes_are_one_sentence(scans, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_here(arguments(scans, tmp_path, "run", *REGNET, *overrides))


def test_colour_needs_colour(scans, tmp_path):
    with pytest.raises(ValueError, match=r"gray must be 0 for images of 1 channels"):
        run_here(
            arguments(scans, tmp_path, "run", *REGNET, "pixels.channels=1", "pixels.estimate=9")
        )
