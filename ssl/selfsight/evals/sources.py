"""The images of a run of the loop: those it learns from, those it is evaluated on, and how."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from selfsight.build import build
from selfsight.data.decode import DecodeLimits
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.part import Part, labels_of, split_indices
from selfsight.data.sources.source import Source
from selfsight.evals.bench import SPLIT_SEED
from selfsight.evals.classifier import ClassifierEvaluation
from selfsight.evals.labelled import check_same_names
from selfsight.evals.online import OnlineEvaluation
from selfsight.evals.settings import short_name


@dataclass
class RunSources:
    """`bank` and `queries` are the labelled split of the k-NN; or `val` chooses among the states of
    a classifier and `test` is reported on. None: there is none."""

    train: Source
    bank: Source | None = None
    queries: Source | None = None
    val: Source | None = None
    test: Source | None = None
    classes: int | None = None


def run_sources(config: DictConfig) -> RunSources:
    """Build them, and set `method.classes=auto` to the number of classes that the data has.

    A classifier needs labels. What chooses is never what is reported: of data with a split of its
    own a tenth of the training images (the middle share of `eval.split`), of other data also the
    last share is taken from them; always the same ones.

    Raises:
        ValueError: labels are missing or of one class, or names differ between the splits.
    """
    data = config.data
    train = build(data.train)
    if config.eval.kind != "classifier":
        build_if = lambda node: build(node) if node else None  # noqa: E731
        return RunSources(train, build_if(data.eval_train), build_if(data.eval_val))
    labels = _labels(train)
    test = build(data.eval_val) if data.eval_val else None
    learn, choose, report = config.eval.split
    if test is not None:
        check_same_names(train, test)
        learn, report = learn + report, 0.0
    parts = split_indices(len(train), (learn, choose, report), SPLIT_SEED, labels)
    named = [
        Part(train, part, f"{train.name}, {len(part):,} of {len(train):,}") if len(part) else None
        for part in parts
    ]
    classes = len(train.classes) if train.classes else int(labels.max()) + 1
    if test is None:
        test = named[2]
    elif (known := test.labels()) is not None:
        shown = np.unique(labels)
        unknown = np.setdiff1d(known, shown)
        if len(unknown):
            number = int(unknown[0])
            name = test.classes[number] if test.classes and number >= 0 else number
            raise ValueError(
                f"{test.name}: the class {name} has no image in {train.name}"
                if number >= 0
                else f"{test.name}: {int((known < 0).sum())} images have no label"
            )
    if config.method.get("classes") == "auto":
        config.method.classes = classes
    if named[0] is None:
        raise ValueError(f"eval.split={list(config.eval.split)} leaves no image to learn from")
    return RunSources(named[0], val=named[1], test=test, classes=classes)


def _labels(source: Source) -> Any:
    labels = labels_of(source)
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        raise ValueError(
            f"{source.name}: {len(missing)} of {len(labels)} images have no label (such as "
            f"{source.key(int(missing[0]))}), and method=supervised learns from labels"
        )
    if len(np.unique(labels)) < 2:
        raise ValueError(f"{source.name}: all {len(labels)} images are of one class")
    return labels


def evaluation_during(
    config: DictConfig,
    sources: RunSources,
    *,
    limits: DecodeLimits,
    pixels: PixelFormat,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    folder: Path,
) -> OnlineEvaluation | ClassifierEvaluation:
    """The evaluation that a run makes of itself, by `eval.kind`."""
    if config.eval.kind == "classifier":
        assert sources.classes is not None
        report: Any = OmegaConf.to_container(config.eval.report or OmegaConf.create(), resolve=True)
        report.setdefault("data", short_name(config.data))
        return ClassifierEvaluation(
            train=sources.train,
            val=sources.val,
            test=sources.test,
            classes=sources.classes,
            size=config.data.eval_size,
            batch_size=config.eval.batch_size,
            limits=limits,
            pixels=pixels,
            device=device,
            autocast=autocast,
            folder=folder,
            report=report,
        )
    return OnlineEvaluation(
        source=sources.train,
        bank=sources.bank,
        queries=sources.queries,
        size=config.data.eval_size,
        limit=tuple(config.data.eval_limit),
        neighbours=config.eval.neighbours,
        temperature=config.eval.temperature,
        batch_size=config.eval.batch_size,
        limits=limits,
        pixels=pixels,
        device=device,
        autocast=autocast,
    )
