"""The contract of a source: a list of samples that can be read in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

# fmt: off
IMAGE_EXTENSIONS = frozenset([
    "jpg", "jpeg", "jpe", "jfif", "png", "gif", "webp", "avif", "bmp", "tif", "tiff",
    "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "tga",
])
# fmt: on


@dataclass(slots=True)
class Record:
    """One stored sample.

    Attributes:
        key: its name, unique within the source and independent of where the source is mounted; the
            augmentation is seeded with it.
        data: an encoded image (bytes), or its pixels, uint8 RGB (height, width, 3).
        label: class index from 0, or None.
    """

    key: str
    data: bytes | np.ndarray
    label: int | None = None


class Source(ABC):
    """A list of samples.

    A source must be picklable (it is sent to the worker processes), opens its files on first use in
    each process, and allows `read` from several threads.

    Attributes:
        name: short name for messages and the ledger.
        classes: names of the classes, or None where there are no labels or no names.
        per_process: attributes that are not sent to another process; `prepare` makes them anew.
    """

    name: str
    classes: list[str] | None = None
    per_process: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int) -> Record:
        """Fetch sample `index`. OSError means that this one sample cannot be read."""

    def key(self, index: int) -> str:
        """The name of sample `index` without reading it, for reports of one that fails."""
        return str(index)

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to prepare)
        """Set the attributes of `per_process`: when built, and in each process that gets it."""

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in self.per_process}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.prepare()


class StringTable:
    """Many strings in one block of memory: quick to pickle, about as large as the text itself."""

    def __init__(self, strings: list[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].decode("utf-8", "surrogateescape")
