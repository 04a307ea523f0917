"""One image at a time through what a loader does with it, each stage timed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from selfsight.data.decode import DecodeError, DecodeLimits, Encoded
from selfsight.data.multicrop import CropGroup, MultiCrop, View
from selfsight.data.pixels import PixelFormat, from_array
from selfsight.inspection.content import Content, content
from selfsight.inspection.sample import Entry

STAGES = ("fetch", "decode", "crops", "colour")

DARK = 16 / 255  # an image is black where 99 % of its pixels are darker
PLAIN = 8 / 255  # and plain where 98 % of them lie within so much
_GRID = 64  # pixels a side that are looked at for that


@dataclass
class Seen:
    """What was found out about one entry of the stream.

    Attributes:
        source: number of its source.
        key: its name.
        reason: why it cannot be used; "" where it can.
        bytes: length of its file; 0 where it was not fetched, or is no file.
        digest: of its bytes or pixels.
        label: class index, or None.
        content: what the file is.
        width, height: upright size in pixels, as its header says; 0 where it says nothing.
        black, plain: whether (nearly) all of it is black, or of one colour.
        boxes: (height, width) in pixels of each crop, group by group.
    """

    source: int
    key: str
    reason: str = ""
    bytes: int = 0
    digest: bytes = b""
    label: int | None = None
    content: Content = field(default_factory=lambda: Content("unknown"))
    width: int = 0
    height: int = 0
    black: bool = False
    plain: bool = False
    boxes: list[tuple[int, int]] = field(default_factory=list)


class Examiner:
    """Does to images what the loader of a run does.

    Args:
        groups: the crops of the run.
        limits, pixels, reduced: how it decodes.
        seed: of its augmentation.
        decode_seconds: an image whose decoding takes longer is passed over by a run.

    Attributes:
        seconds: of processor time, by stage, over all images so far; what fetching took is added
            by the caller, as time on the clock.
        slowest: (seconds, key) of the image that took longest.
        pixels: of the image examined last, as decoded; None where it cannot be used.
        views: its crops, one array (count, size, size, C) a group.

    Raises:
        ValueError: the crops do not fit the pixels.
    """

    def __init__(
        self,
        groups: Mapping[str, CropGroup],
        *,
        limits: DecodeLimits,
        pixels: PixelFormat,
        reduced: bool,
        seed: int,
        decode_seconds: float,
    ) -> None:
        self.plain = MultiCrop(groups, pixels=pixels, reduced=reduced, colour=False)
        self.full = MultiCrop(groups, pixels=pixels, reduced=reduced)
        self.seconds: dict[str, float] = {stage: 0.0 for stage in STAGES}
        self.slowest = (0.0, "")
        self.pixels: np.ndarray | None = None
        self.views = [np.empty(s, self.full.dtype)[:, 0] for s in self.full.shapes(1)]
        self._scratch = [np.empty_like(views) for views in self.views]
        self._limits, self._format, self._reduced = limits, pixels, reduced
        self._seed, self._most = seed, decode_seconds

    def examine(self, entry: Entry) -> Seen:
        """Look at an entry, decode it and make its crops."""
        self.pixels = None
        seen = Seen(entry.source, entry.key, entry.error)
        if entry.record is None:
            return seen
        data, seen.label = entry.record.data, entry.record.label
        seen.content = content(data, self._limits)
        if isinstance(data, bytes):
            seen.bytes = len(data)
            seen.digest = hashlib.blake2b(data, digest_size=16).digest()
        else:
            shape = repr((data.shape, data.dtype.str)).encode()
            seen.digest = hashlib.blake2b(data.tobytes(), digest_size=16, key=shape[:64]).digest()
        before = sum(self.seconds.values())
        start = time.monotonic()
        try:
            views = self._work(entry, data, seen)
        except DecodeError as error:
            seen.reason = str(error)
            return seen
        finally:
            self.slowest = max(self.slowest, (sum(self.seconds.values()) - before, entry.key))
        if time.monotonic() - start > self._most:
            seen.reason = f"it takes longer than loader.decode_seconds={self._most:g}"
            self.pixels = None
            return seen
        seen.boxes = [(view.box.height, view.box.width) for view in views]
        assert self.pixels is not None
        seen.black, seen.plain = _emptiness(self.pixels, self._format)
        return seen

    def _work(self, entry: Entry, data: bytes | np.ndarray, seen: Seen) -> list[View]:
        image, pixels = None, None
        with self._timed("decode"):
            if isinstance(data, bytes):
                image = Encoded(data, self._limits, self._format)
                seen.width, seen.height = image.width, image.height
            else:
                pixels = from_array(data, self._format)
                seen.height, seen.width = pixels.shape[:2]
        with self._timed("crops"):
            views = self.full.plan(self._seed, 0, entry.key, seen.width, seen.height)
        boxes = None
        if image is not None:
            with self._timed("decode"):
                pixels = image.decode(self.full.reduction(views) if self._reduced else 1)
            boxes = [image.place(view.box) for view in views]
        assert pixels is not None
        # What a run does comes first, with cold caches; then the crops alone, to tell them apart.
        with self._timed("colour"):
            self.full.render(pixels, views, self.views, boxes)
        both = self.seconds["crops"]
        with self._timed("crops"):
            self.plain.render(pixels, views, self._scratch, boxes)
        self.seconds["colour"] -= self.seconds["crops"] - both
        self.pixels = pixels
        return views

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.process_time()  # other programs on the machine do not count
        try:
            yield
        finally:
            self.seconds[stage] += time.process_time() - start


def _emptiness(pixels: np.ndarray, form: PixelFormat) -> tuple[bool, bool]:
    """Whether an image (H, W, C) is black, and whether it is plain, nearly."""
    height, width, channels = pixels.shape
    some = pixels[:: -(-height // _GRID), :: -(-width // _GRID)].reshape(-1, channels)
    low, high = np.percentile(some, [1, 99], axis=0) / form.top
    return bool((high < DARK).all()), bool((high - low <= PLAIN).all())
