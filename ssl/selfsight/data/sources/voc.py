"""PASCAL VOC's classification task: images that show one or several of 20 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Record, Source


class VOC(Source):
    """One split of VOCdevkit/VOC{year}, by ImageSets/Main/CLASS_SPLIT.txt: 1, -1, and 0 for
    difficult objects, which are not judged. The key of a sample is its name.

    Args:
        root: the folder VOCdevkit, or one that holds it.
        year: 2007 or 2012.
        split: train, val, trainval or test.

    Raises:
        ValueError: the files are not there.
    """

    def __init__(self, root: str | None, year: int = 2007, split: str = "trainval") -> None:
        if root is None:
            raise ValueError("the folder VOCdevkit is needed: set data.root=/path/to/VOCdevkit.")
        places = [Path(root).expanduser() / p / f"VOC{year}" for p in ("", "VOCdevkit")]
        folder = next((p for p in places if p.is_dir()), places[0])
        self.name = f"VOC{year}/{split}"
        self._images = folder / "JPEGImages"
        lists = sorted((folder / "ImageSets" / "Main").glob(f"*_{split}.txt"))
        if not lists:
            raise ValueError(f"{folder} has no ImageSets/Main/CLASS_{split}.txt.")
        self.classes = [p.name.removesuffix(f"_{split}.txt") for p in lists]
        rows = [[line.split() for line in p.read_text().splitlines() if line] for p in lists]
        self._keys = [name for name, _ in rows[0]]
        signs = {"1": 1, "-1": 0, "0": -1}
        try:
            columns = [{name: signs[sign] for name, sign in own} for own in rows]
            table = [[column[key] for column in columns] for key in self._keys]
        except (KeyError, ValueError) as error:
            raise ValueError(f"the lists of {folder} do not agree: {error}.") from None
        self._sets = np.array(table, np.int8)
        self.label_sets = self._label_set

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> Record:
        name = self._keys[index]
        try:
            return Record(name, (self._images / f"{name}.jpg").read_bytes())
        except OSError as error:
            raise OSError(f"{name}.jpg cannot be read: {error.strerror}") from None

    def _label_set(self, index: int) -> np.ndarray:
        return self._sets[index]
