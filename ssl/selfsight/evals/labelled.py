"""Labelled features of a split, and what is refused of it: one sentence each."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from selfsight.data.sources.source import Source
from selfsight.evals.store import Features


@dataclass(frozen=True)
class Split:
    """Some images of a set, with their features.

    Attributes:
        name: for messages.
        source: where they are from.
        features: of the whole set.
        places: int64 (n,), which of its usable images.
    """

    name: str
    source: Source
    features: Features
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (n,), or int8 (n, classes) where an image may have several."""
        return self.features.labels[self.places]

    @property
    def multilabel(self) -> bool:
        return self.features.labels.ndim == 2

    def take(self, layer: str, indices: Tensor | None = None) -> Tensor:
        """fp32 (n, d), of all or of those places of this split."""
        return self.features.take(layer, self.places if indices is None else self.places[indices])

    def part(self, indices: Tensor, name: str | None = None) -> "Split":
        """Some of these."""
        return Split(name or self.name, self.source, self.features, self.places[indices])

    def keys(self) -> list[str]:
        """Names of the images."""
        return [self.source.key(int(row)) for row in self.features.rows[self.places]]

    def class_name(self, number: int) -> str:
        names = self.source.classes
        return names[number] if names and number < len(names) else str(number)


def check_labelled(split: Split) -> None:
    """Refuse a split without usable single labels.

    Raises:
        ValueError: several labels an image, labels missing, or one class only.
    """
    if split.multilabel:
        raise ValueError(
            f"{split.name}: an image has several labels here, and this evaluation takes one; use "
            "eval=multilabel"
        )
    missing = (split.labels < 0).nonzero().flatten()
    if len(missing):
        key = split.source.key(int(split.features.rows[split.places[missing[0]]]))
        who = f"{len(missing)} of {len(split)} have no"
        who = "no image has" if len(missing) == len(split) else who
        raise ValueError(
            f"{split.name}: {who} label (such as {key}): this evaluation needs labels; eval=health "
            "needs none"
        )
    if len(split.labels.unique()) < 2:
        only = split.class_name(int(split.labels[0]))
        raise ValueError(
            f"{split.name}: all {len(split)} images are of one class ({only}): there is nothing "
            "to tell apart"
        )


def check_pair(train: Split, test: Split) -> int:
    """Refuse two splits whose classes differ; returns the number of classes.

    Raises:
        ValueError: the names differ, or a class is asked for that was never shown.
    """
    check_same_names(train.source, test.source)
    for split in (train, test):
        check_labelled(split)
    classes = int(torch.maximum(train.labels.max(), test.labels.max())) + 1
    shown = torch.zeros(classes, dtype=torch.bool)
    shown[train.labels] = True
    unknown = test.labels[~shown[test.labels]]
    if len(unknown):
        name = test.class_name(int(unknown[0]))
        raise ValueError(
            f"{test.name}: the class {name} has no image in {train.name}, so no method could "
            "name it"
        )
    return classes


def check_same_names(train: Source, test: Source) -> None:
    """Refuse two sources whose class names differ: their numbers would mean different things."""
    a, b = train.classes, test.classes
    if a is None or b is None or a == b:
        return
    different = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if different:
        said = f"class {a.index(different[0][0])} is {different[0][0]!r} in one and "
        said += f"{different[0][1]!r} in the other"
    else:
        longer, which = (a, train) if len(a) > len(b) else (b, test)
        said = f"{longer[min(len(a), len(b))]!r} is in {which.name} alone"
    raise ValueError(f"the classes of {train.name} and {test.name} differ: {said}")
