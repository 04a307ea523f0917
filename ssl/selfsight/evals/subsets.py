"""Low-shot subsets: so many images a class, deterministic, each within the next larger one.

Every class has an order of its images that follows from the seed alone; a subset takes the first
ones of each. So the 5 images a class of seed 0 are among its 10, its 1 % among its 10 %.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsight.tracking.folder import write_whole


@dataclass(frozen=True)
class Amount:
    """How much of the labels: a share of each class, or a number of images of each."""

    share: float | None = None
    shots: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """From "10 %" or "5 a class".

        Raises:
            ValueError: it is neither.
        """
        percent = re.fullmatch(r"\s*([\d.]+)\s*%\s*", str(text))
        count = re.fullmatch(r"\s*(\d+)\s*(a class)?\s*", str(text))
        if percent and 0 < float(percent.group(1)) <= 100:
            return cls(share=float(percent.group(1)) / 100)
        if count and int(count.group(1)) > 0:
            return cls(shots=int(count.group(1)))
        raise ValueError(f"images={text!r} is neither a share such as '10 %' nor '5 a class'")

    def __str__(self) -> str:
        return f"{self.shots} a class" if self.share is None else f"{100 * self.share:g} %"

    @property
    def tag(self) -> str:
        """As part of a file's name."""
        return f"{self.shots}shot" if self.share is None else f"{100 * self.share:g}pct"


@dataclass(frozen=True)
class Subset:
    """A named list of images."""

    name: str
    keys: list[str]


def subsets(
    labels: np.ndarray,
    amounts: Sequence[Amount],
    *,
    seed: int,
    names: Sequence[str] | None = None,
    what: str = "the data",
) -> list[np.ndarray]:
    """Indices of the subset of each amount, sorted.

    Args:
        labels: int64 (n,).
        names: of the classes, for messages.

    Raises:
        ValueError: a class has fewer images than asked for.
    """
    found: list[list[np.ndarray]] = [[] for _ in amounts]
    for number in np.unique(labels):
        own = np.flatnonzero(labels == number)
        generator = np.random.Generator(np.random.Philox(key=[seed, int(number)]))
        own = own[generator.permutation(len(own))]
        for parts, amount in zip(found, amounts, strict=True):
            if amount.share is not None:
                wanted = max(1, math.ceil(amount.share * len(own) - 1e-9))
            else:
                wanted = amount.shots or 1
            if wanted > len(own):
                name = names[number] if names and 0 <= number < len(names) else number
                raise ValueError(
                    f"{what}: the class {name} has {len(own)} images and {amount} are asked for"
                )
            parts.append(own[:wanted])
    return [np.sort(np.concatenate(parts)) for parts in found]


def write_subset(folder: Path, source: str, subset: Subset) -> Path:
    """Write a list of images as JSON, to be published or read by `data.sources.part.listed`."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join(subset.keys).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{source}-{subset.name}")
    content = {"source": source, "subset": subset.name, "images": len(subset.keys)}
    path = folder / f"{name}.json"
    write_whole(
        path, json.dumps(content | {"sha256": digest, "keys": subset.keys}, indent=0) + "\n"
    )
    return path
