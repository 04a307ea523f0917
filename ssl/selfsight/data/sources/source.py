"""The contract of a source: samples that can be read in any order, in units for the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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


class Gone(OSError):
    """A shard is no longer there: the whole of its piece is passed over."""


class Source(ABC):
    """A list of samples, and how the stream cuts it into units that it may permute.

    The stream permutes shards, and hands their pieces to lanes, which read a piece member by member
    in an order of their own. By default every image is a shard of one piece of one image, so that
    single images are permuted. A source whose images are costly to reach one by one has shards of
    many images and overrides the second half of the methods.

    A source must be picklable (it is sent to the worker processes), opens its files on first use in
    each process, and allows reads from several threads. What a read returns depends on nothing but
    its arguments.

    Attributes:
        name: short name for messages and the ledger.
        classes: names of the classes, or None where there are no labels or no names.
        per_process: attributes that are not sent to another process; `prepare` makes them anew.
        threads: reads that a worker keeps in flight, where reading waits for a network; 0 reads in
            place.
        flat: whether every shard is one image, so that nothing is cut.
        pieces: parts that each shard is cut into.
        grows: whether shards may be added while a run goes on.
        founders: of a list that has grown, the number of shards it began with.
        label_sets: where an image may have several classes: index -> int8 (classes,), 1 where it
            shows the class, 0 where not, -1 where it is not judged; else None.
    """

    name: str
    classes: list[str] | None = None
    per_process: tuple[str, ...] = ()
    threads: int = 0
    flat: bool = True
    pieces: int = 1
    grows: bool = False
    founders: int | None = None
    label_sets: Callable[[int], np.ndarray] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images; ValueError where it is not known without reading all of them."""

    @abstractmethod
    def read(self, index: int) -> Record:
        """Fetch image `index`. OSError means that this one image cannot be read."""

    def key(self, index: int) -> str:
        """The name of image `index` without reading it, for reports of one that fails."""
        return str(index)

    def labels(self) -> np.ndarray | None:
        """int64 labels of all images, -1 for none, where they are known without reading images."""
        return None

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to prepare)
        """Set the attributes of `per_process`: when built, and in each process that gets it."""

    # ------------------------------------------------------------- units for the stream

    def shards(self) -> int:
        """Number of shards."""
        return len(self)

    def length(self, shard: int, piece: int) -> int:
        """Images of a piece; it may read the shard's index.

        Raises:
            OSError: the shard cannot be read now, so the piece is passed over. `Gone`: never again.
        """
        return 1

    def fetch(self, shard: int, piece: int, member: int) -> Record:
        """Fetch one image of a piece. OSError means that this one image cannot be read."""
        return self.read(shard)

    def fetch_key(self, shard: int, piece: int, member: int) -> str:
        """The name of that image without reading it; for member -1, of the shard."""
        return self.key(shard)

    def will_need(self, shard: int, piece: int) -> None:  # noqa: B027 (a hint)
        """That piece comes next in some lane: a remote shard may be fetched in the background."""

    # ------------------------------------------------------------- a list that grows

    def poll(self) -> list[str]:
        """Names of shards that are there and not yet listed, in the order to append them."""
        return []

    def extend(self, names: list[str]) -> None:
        """Append shards; those listed keep their numbers."""
        raise NotImplementedError

    def listing(self) -> list[str]:
        """Names of all shards, in order."""
        raise NotImplementedError

    def adopt(self, names: list[str]) -> None:
        """Replace the list by one recorded before."""
        raise NotImplementedError

    # ------------------------------------------------------------- the rest

    def extent(self) -> str:
        """How much there is, in words."""
        try:
            return f"{len(self):,} images"
        except ValueError:
            return f"{self.shards():,} shards"

    def excerpt(self, limit: int) -> Source:
        """At most `limit` images, evenly spread."""
        return Excerpt(self, limit)

    def fingerprint(self) -> str:
        """A short text that differs where the list of images differs, to notice it on resume."""
        return f"{len(self)} images"

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in self.per_process}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.prepare()


class Excerpt(Source):
    """At most `limit` images of another source, evenly spread, without needing its length.

    Of a source of large shards they come from no more than `most_shards` of these.

    Raises:
        ValueError: none of these can be opened.
    """

    def __init__(self, source: Source, limit: int, most_shards: int = 8) -> None:
        self.name, self.classes, self.threads = source.name, source.classes, source.threads
        self._source = source
        shards, pieces = source.founders or source.shards(), source.pieces
        self._places: list[tuple[int, int, int]] = []
        chosen = min(shards, limit if source.flat else most_shards)
        problem: OSError | None = None
        away = 0
        for n in range(chosen):
            shard = n * shards // chosen
            share = (n + 1) * limit // chosen - n * limit // chosen
            try:
                lengths = [source.length(shard, piece) for piece in range(pieces)]
            except OSError as error:
                problem = problem or error
                away += not isinstance(error, Gone)
                if away == 2 and not self._places:
                    break  # the store itself, most likely: each would cost all retries
                continue
            everything = [(shard, p, m) for p, length in enumerate(lengths) for m in range(length)]
            share = min(share, len(everything))
            self._places += [everything[k * len(everything) // share] for k in range(share)]
        if problem is not None and not self._places:
            raise ValueError(f"{self.name}: no shard of {shards:,} can be opened ({problem}).")

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Record:
        return self._source.fetch(*self._places[index])

    def key(self, index: int) -> str:
        return self._source.fetch_key(*self._places[index])


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
