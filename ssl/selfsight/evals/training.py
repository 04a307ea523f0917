"""Evaluations that train: fine-tuning, low-shot fine-tuning, and the probe on random crops.

Each asks for runs of the loop with method=supervised, one a repeat, in evals/runs beside the
results. A run chooses its state on val and reports on test (`selfsight.evals.classifier`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict

from selfsight.build import build, compose
from selfsight.config import check
from selfsight.data.sources.part import labels_of
from selfsight.evals.bench import cut
from selfsight.evals.evaluator import TrainingEvaluator, TrainingRun
from selfsight.evals.settings import short_name
from selfsight.evals.subject import as_ours, read_description, trunk_file
from selfsight.evals.subsets import Amount, Subset, subsets, write_subset


class FineTune(TrainingEvaluator):
    """Training of the whole trunk, or of classifiers on a frozen one, from its weights.

    Args:
        recipe: of conf/recipe: the settings.
        seeds: repeats; each shuffles and initialises anew.
        images: shares or numbers a class to learn from ("10 %", "5 a class"), each a subset of the
            next larger; None: all.
        subset_seeds: subsets of each amount.
        from_scratch: keep the trunk as initialised, with the same settings: what pretraining adds.
        keep_head: keep the first layer of the pretraining head too (SEER, low-shot), from the run.
        set: further settings of the run, as on its command line: ["epochs=10"].
    """

    def __init__(
        self,
        *,
        recipe: str,
        seeds: int = 1,
        images: Sequence[str] | None = None,
        subset_seeds: int = 1,
        from_scratch: bool = False,
        keep_head: bool = False,
        set: Sequence[str] = (),  # noqa: A002 (the name of the key)
    ) -> None:
        if seeds < 1 or subset_seeds < 1:
            raise ValueError("an evaluation that trains needs at least one seed")
        self.recipe, self.seeds, self.subset_seeds = recipe, seeds, subset_seeds
        self.images = None if images is None else [Amount.parse(text) for text in images]
        self.from_scratch, self.keep_head = from_scratch, keep_head
        self.set = list(set)

    def runs(self, seed: int) -> list[TrainingRun]:
        overrides = ["data=scenes", f"recipe={self.recipe}", *self.set]
        found = []
        amounts = self.images or [None]
        for amount in amounts:
            for subset_seed in range(self.subset_seeds if amount else 1):
                for repeat in range(self.seeds):
                    words = [] if amount is None else [f"{amount.tag}-subset{subset_seed}"]
                    facts: dict[str, Any] = {"seed": seed + repeat}
                    if amount is not None:
                        facts |= {"images": str(amount), "subset": subset_seed}
                    found.append(
                        TrainingRun(
                            "-".join([*words, f"seed{seed + repeat}"]),
                            overrides,
                            {"seed": seed + repeat},
                            facts,
                        )
                    )
        return found


def plan_runs(config: DictConfig, name: str, node: DictConfig) -> list[tuple[DictConfig, str]]:
    """The checked configuration and name of every run that an evaluation asks for.

    Raises:
        ValueError: trunk, data or settings do not go together; one sentence.
    """
    evaluator = build(node)
    assert isinstance(evaluator, TrainingEvaluator)
    path = as_ours(trunk_file(config.run, config.trunk, config.step), Path(config.out) / "trunk")
    trunk, pixels, facts = read_description(path)
    out = Path(config.out)
    scratch = config.random_init or getattr(evaluator, "from_scratch", False)
    data, data_name = config.data, config.data_name
    lists: dict[tuple[str, int], str] = {}
    planned = []
    for run in evaluator.runs(config.seed):
        composed = compose("pretrain", run.overrides)
        with open_dict(composed):
            composed.data = OmegaConf.create(OmegaConf.to_container(data, resolve=True))
            composed.model.trunk = OmegaConf.create(trunk)
            composed.cluster = config.cluster
            for key in ("device", "precision"):
                composed[key] = config[key]
            composed.tracking = OmegaConf.merge(composed.tracking, config.tracking)
            for key in ("channels", "bits", "mean", "std"):
                composed.pixels[key] = pixels[key]
            composed.pixels.estimate = 0
            if config.image_size is not None:
                composed.data.eval_size = config.image_size
            if not scratch:
                composed.method.weights = str(path.absolute())
                if getattr(evaluator, "keep_head", False):
                    if config.run is None:
                        raise ValueError(f"eval.{name}.keep_head needs run=: a trunk has no head")
                    composed.method.head_checkpoint = str(Path(config.run).expanduser().absolute())
            if "images" in run.facts:
                key = (run.facts["images"], run.facts["subset"])
                if not lists:
                    lists = _write_subsets(composed.data, evaluator, out)
                _learn_from(composed, lists[key], lists[("test", 0)])
            for key, value in run.values.items():
                OmegaConf.update(composed, key, value, force_add=True)
            label = name + (".random_init" if scratch else "")
            suffix = run.suffix if config.step is None else f"step_{config.step:08d}-{run.suffix}"
            composed.name = f"{label}-{data_name or short_name(composed.data)}-{suffix}"
            composed.runs_dir = str(out / "runs")
            composed.resume = "anyway"
            composed.checkpoint.keep = 2
            composed.eval.report = {
                "evaluator": name,
                "folder": str(out),
                "subject": {**facts, "file": path.name, "random_init": bool(scratch)},
                "data": data_name or short_name(composed.data),
                "suffix": suffix,
                "facts": {**run.facts, "step": config.step},
                "protocol": f"{name} (recipe {getattr(evaluator, 'recipe', '')})"
                + (f", {run.facts['images']} of the labels" if "images" in run.facts else ""),
            }
        planned.append((check(composed), composed.name))
    return planned


def _write_subsets(data: DictConfig, evaluator: Any, out: Path) -> dict[tuple[str, int], str]:
    """Write the lists of images of every subset, and that of the test; where they are."""
    source = build(data.train)
    labels = labels_of(source)
    places = np.arange(len(source))
    found: dict[tuple[str, int], str] = {("test", 0): ""}
    folder = out / "subsets"
    if data.eval_val is None:
        learn, choose, test = cut(source)
        places = np.sort(np.concatenate([learn, choose]))
        held = Subset("test", [source.key(int(i)) for i in test])
        found[("test", 0)] = str(write_subset(folder, source.name, held))
    for seed in range(evaluator.subset_seeds):
        keys = [source.key(int(i)) for i in places]
        cuts = subsets(
            labels[places], evaluator.images, seed=seed, names=source.classes, what=source.name
        )
        for amount, indices in zip(evaluator.images, cuts, strict=True):
            subset = Subset(f"{amount.tag}-subset{seed}", [keys[i] for i in indices])
            found[(str(amount), seed)] = str(write_subset(folder, source.name, subset))
    return found


def _learn_from(composed: DictConfig, learn: str, test: str) -> None:
    """Train on a list of images alone, all of them, and report the last state."""
    listed = "selfsight.data.sources.part.listed"
    whole = composed.data.train
    composed.data.train = {"_target_": listed, "source": whole, "file": learn}
    if test:
        composed.data.eval_val = {"_target_": listed, "source": whole, "file": test}
    composed.eval.split = [1.0, 0.0, 0.0]
