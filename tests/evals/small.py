"""A small trunk of a made-up run, and real features of embedded scenes, for tests of evaluations."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.build import build, compose
from selfsight.data.evaluation import read_images
from selfsight.data.sources.synthetic import SyntheticScenes
from selfsight.distributed.env import World
from selfsight.distributed.payload import write_tensors
from selfsight.evals.job import evaluate
from selfsight.evals.plans import plan_jobs
from selfsight.evals.settings import check_evaluation, expand

TRUNK = {
    "_target_": "selfsight.trunks.regnet.RegNetY",
    "depth": 5,
    "w_0": 8,
    "w_a": 12.0,
    "w_m": 2.0,
    "group_width": 8,
    "stem_width": 8,
    "first_stage_stride": 1,
}
PIXELS = {"channels": 3, "bits": 8, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MODEL = ["model=regnety_tiny", "model.trunk.depth=5", "model.trunk.w_0=8", "model.trunk.w_a=12.0"]
MODEL += ["model.trunk.w_m=2.0", "model.trunk.group_width=8", "model.trunk.stem_width=8"]
MODEL += ["model.head.widths=[64,32,16]", "model.trunk.first_stage_stride=1"]
SCENES = ["data=scenes", "data.train.length=240", "data.eval_train.length=240"]
SCENES += ["data.eval_val.length=120", "data.eval_size=32"]


def export(folder: Path, seed: int = 0) -> Path:
    """The folder of a run that has ended, as far as evaluations look at it."""
    torch.manual_seed(seed)
    trunk = build(TRUNK)
    folder.mkdir(parents=True)
    metadata = {
        "format": "pt",
        "trunk": json.dumps(TRUNK),
        "pixels": json.dumps(PIXELS),
        "run": folder.name,
        "step": "10",
    }
    write_tensors(folder / "trunk.safetensors", trunk.state_dict(), metadata)
    return folder


def scene_features(count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Features (count, d) of scenes from an untrained trunk, and their labels."""
    source = SyntheticScenes(length=count, split=split)
    images, labels, _ = read_images(source, range(count), size=32)
    torch.manual_seed(0)
    trunk = build(TRUNK).train()  # batch statistics: running ones have seen nothing
    with torch.no_grad():
        return trunk((images.float() / 255 - 0.45) / 0.225), labels


def run_evaluation(*arguments: str) -> dict[str, dict[str, Any]]:
    """Evaluate as the command does, in this process; the results by name of their files."""
    config = check_evaluation(compose("evaluate", expand([*arguments, "cluster.threads=1"])))
    found = {}
    try:
        for function, runs in plan_jobs(config):
            assert function == "selfsight.evals.job.evaluate"
            for own, name in runs:
                evaluate(own, name, World())
                for path in Path(own.out).glob("*.json"):
                    found[path.stem] = json.loads(path.read_text())
    finally:
        torch.use_deterministic_algorithms(False)
    return found
