"""A part of another source: of a split made here, or of a list that somebody has written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Record, Source

PARTS = ("train", "val", "test")
_THREADS = 8
_NEAR = 5  # keys named in a message


class Part(Source):
    """Some images of `source`, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, name: str) -> None:
        self._source, self.name = source, name
        self.indices = np.asarray(indices, np.int64)
        self.classes, self.threads = source.classes, source.threads
        if source.label_sets is not None:
            self.label_sets = self._label_sets

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self._source.key(int(self.indices[index]))

    def read(self, index: int) -> Record:
        return self._source.read(int(self.indices[index]))

    def labels(self) -> np.ndarray | None:
        known = self._source.labels()
        return None if known is None else known[self.indices]

    def fingerprint(self) -> str:
        digest = np.bitwise_xor.reduce(self.indices * np.int64(0x9E3779B1)) if len(self) else 0
        return f"{len(self)} of {self._source.fingerprint()}, {int(digest) & 0xFFFFFFFF:08x}"

    def _label_sets(self, index: int) -> np.ndarray:
        assert self._source.label_sets is not None
        return self._source.label_sets(int(self.indices[index]))


def listed(source: Source, file: str) -> Source:
    """The images of `source` that a file lists: JSON with a list `keys`, as evaluations save their
    subsets, or a text file of one key a line.

    Raises:
        ValueError: the file cannot be read, or names images that the source does not have.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text()
        keys = json.loads(text)["keys"] if path.suffix == ".json" else text.split("\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the list of images {path} cannot be read: {error}.") from None
    wanted = dict.fromkeys(key for key in keys if key)
    places = {key: i for i in range(len(source)) if (key := source.key(i)) in wanted}
    lost = [key for key in wanted if key not in places]
    if lost or not wanted:
        some = ", ".join(lost[:_NEAR])
        said = f"{len(lost)} images that {source.name} lacks: {some}" if lost else "no image"
        raise ValueError(f"the list {path} names {said}.")
    return Part(source, sorted(places[key] for key in wanted), f"{source.name}, {path.stem}")


def labels_of(source: Source) -> np.ndarray:
    """int64 labels of all images, -1 for none; read one by one where the source has no list."""
    known = source.labels()
    if known is not None:
        return known

    def one(index: int) -> int:
        try:
            label = source.read(index).label
        except OSError:
            return -1
        return -1 if label is None else label

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.fromiter(pool.map(one, range(len(source))), np.int64, len(source))


def split_indices(
    count: int, shares: Sequence[float], seed: int, labels: np.ndarray | None = None
) -> list[np.ndarray]:
    """Cut 0 ... count-1 into parts of these shares, at random but always the same for one seed.

    With labels each class is cut by itself, so that every part has its share of every class; what
    does not come out even goes where most is owed.

    Raises:
        ValueError: shares that do not add up to 1.
    """
    if any(s < 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares of a split {list(shares)} must add up to 1.")
    generator = np.random.Generator(np.random.Philox(seed))
    order = generator.permutation(count)
    groups = [order] if labels is None else [order[labels[order] == c] for c in np.unique(labels)]
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    owed = np.zeros(len(shares))
    for group in groups:
        owed += np.asarray(shares) * len(group)
        sizes = np.floor(np.asarray(shares) * len(group)).astype(int)
        for _ in range(len(group) - int(sizes.sum())):
            taken = [sum(map(len, part)) for part in parts]
            sizes[int(np.argmax(owed - taken - sizes))] += 1
        for part, piece in zip(parts, np.split(group, np.cumsum(sizes)[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
