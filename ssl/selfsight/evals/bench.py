"""What an evaluator is given: the trunk's features of the labelled splits, and few words."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from selfsight.data.sources.part import labels_of, split_indices
from selfsight.data.sources.source import Source
from selfsight.evals.labelled import Split
from selfsight.evals.store import Features, Transform, extract_features
from selfsight.evals.subject import Subject

SHARES = (0.8, 0.1, 0.1)
SPLIT_SEED = 0  # of splits made here: the same for every trunk and every seed of a head


@dataclass
class Sets:
    """The labelled sources of an evaluation; `test` is None where the data has no split."""

    train: Source
    test: Source | None


@dataclass
class Bench:
    """One trunk and one set of data, for one evaluation after the other.

    `layers` are the vectors extracted; all that the evaluators of a command ask for, at once.
    """

    subject: Subject
    sets: Sets
    layers: Sequence[str]
    transform: Transform
    cache: Path
    out: Path
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    precision: str
    batch_size: int
    workers: int
    seed: int
    half: bool
    limits: tuple[int | None, int | None]
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    extracted: dict[str, int] = field(default_factory=dict)
    _kept: dict[str, Features] = field(default_factory=dict)

    @property
    def train(self) -> Split:
        """The images to learn from. Of data without a split, nine tenths: what is held out to
        choose by is taken from these."""
        if self.sets.test is not None:
            return self._whole(self.sets.train, "train", self.limits[0])
        return self._cut()[0]

    @property
    def test(self) -> Split:
        """The images to report on, and for nothing else."""
        if self.sets.test is not None:
            return self._whole(self.sets.test, "test", self.limits[1])
        return self._cut()[1]

    @property
    def everything(self) -> Split:
        """All images of the training source, for what needs no split."""
        return self._whole(self.sets.train, "train", self.limits[0])

    def features(self, source: Source, name: str, limit: int | None = None) -> Split:
        """Features of any other source, kept likewise."""
        return self._whole(source, name, limit)

    def _whole(self, source: Source, name: str, limit: int | None) -> Split:
        features = self._kept.get(name)
        if features is None:
            indices: Sequence[int] = range(len(source))
            if limit is not None and limit < len(source):
                indices = [i * len(source) // limit for i in range(limit)]
            began = time.monotonic()
            features, cached = extract_features(
                self.subject,
                source,
                indices,
                layers=self.layers,
                folder=self.cache,
                transform=self.transform,
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                autocast=self.autocast,
                precision=self.precision,
                half=self.half,
            )
            took = time.monotonic() - began
            self.seconds[f"features of {name}"] = round(took, 2)
            self.extracted[name] = 0 if cached else len(indices)
            how = "from the cache" if cached else f"in {took:.1f} s, {len(indices) / took:.0f}/s"
            bad = f", {len(features.bad)} unusable" if features.bad else ""
            self.say(f"{source.name}: features of {len(features):,} images {how}{bad}")
            self._kept[name] = features
        return Split(source.name, source, features, torch.arange(len(features)))

    def _cut(self) -> tuple[Split, Split]:
        """Nine and one tenths of the usable images; the same images for every trunk."""
        whole = self.everything
        train, val, test = cut(self.sets.train)
        rows = whole.features.rows.numpy()
        learn = np.flatnonzero(np.isin(rows, np.concatenate([train, val])))
        ask = np.flatnonzero(np.isin(rows, test))
        name = whole.name
        return (
            whole.part(torch.from_numpy(learn), f"{name}, nine tenths"),
            whole.part(torch.from_numpy(ask), f"{name}, one tenth"),
        )


def cut(source: Source, shares: Sequence[float] = SHARES) -> list[np.ndarray]:
    """Indices of train, val and test of a source that has no split: class by class where it has
    single labels, the same every time."""
    labels = None if source.label_sets is not None else labels_of(source)
    return split_indices(len(source), shares, SPLIT_SEED, labels)
