"""Encoded images packed end to end in one .npz file, for sets of many small images."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Record, Source


class PackedNpz(Source):
    """One split of an .npz with `{split}_bytes`, `{split}_offsets` and `{split}_labels`.

    Image i is bytes[offsets[i] : offsets[i + 1]] (uint8, an encoded file); labels are integers from
    0, and may be absent. The arrays are read whole (pickled ones are refused), once a process. The
    key of a sample is `split/i`.

    Raises:
        ValueError: no path given, no such file, not such a file, or no such split.
    """

    per_process = ("_lock", "_bytes")

    def __init__(self, path: str | None, split: str = "train") -> None:
        if path is None:
            raise ValueError("a packed .npz file is needed: set data.path=/path/to/images.npz.")
        self.path = Path(path).expanduser()
        self.split = split
        self.name = f"{self.path.stem}/{split}"
        if not self.path.is_file():
            raise ValueError(f"the packed file {path} does not exist.")
        self.prepare()
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{path} is not an .npz file.")
        with np.load(self.path, allow_pickle=False) as arrays:
            names = arrays.files
            splits = [n.removesuffix("_bytes") for n in names if n.endswith("_bytes")]
            if split not in splits or f"{split}_offsets" not in names:
                raise ValueError(
                    f"{path} has no split {split!r}: it has {', '.join(splits) or 'none'}."
                )
            try:
                self._offsets = arrays[f"{split}_offsets"].astype(np.int64)
                self._labels = (
                    arrays[f"{split}_labels"].astype(np.int64)
                    if f"{split}_labels" in names
                    else None
                )
            except (ValueError, TypeError):
                raise ValueError(
                    f"the offsets or labels of {split!r} in {path} are not plain integers."
                ) from None
        if len(self._offsets) < 2:
            raise ValueError(f"the split {split!r} of {path} holds no image.")

    def prepare(self) -> None:
        self._lock = threading.Lock()
        self._bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def key(self, index: int) -> str:
        return f"{self.split}/{index}"

    def labels(self) -> np.ndarray | None:
        return self._labels

    def read(self, index: int) -> Record:
        with self._lock:
            packed = self._bytes
            if packed is None:
                with np.load(self.path, allow_pickle=False) as arrays:
                    packed = self._bytes = arrays[f"{self.split}_bytes"]
        data = packed[self._offsets[index] : self._offsets[index + 1]].tobytes()
        label = None if self._labels is None else int(self._labels[index])
        return Record(self.key(index), data, label)
