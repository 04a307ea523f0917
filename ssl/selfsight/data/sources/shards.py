"""Tar shards in the layout of WebDataset, anywhere: local disks, `https://`, `s3://`, fsspec.

A few local shards are indexed at once and their images permuted singly ("flat"). Of more shards, or
remote ones, the stream permutes shards and hands out pieces of them; a shard is indexed when it is
first opened, so that a list of 100,000 costs nothing at the start. Remote shards are fetched whole
into a local cache, or read by ranges where there is none.

Nothing is extracted or unpickled: names that point outside a shard and hostile side files have no
effect. See `tar_index` for what is an image, and `listing` for how shards are named.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from selfsight.data.sources import tar_index
from selfsight.data.sources.listing import expand, full, short, title
from selfsight.data.sources.read_ahead import ReadAhead
from selfsight.data.sources.shard_cache import NoRoom, ShardCache, Windows
from selfsight.data.sources.shard_file import LocalShard, RemoteShard
from selfsight.data.sources.source import Gone, Record, Source, StringTable
from selfsight.data.sources.storage import Storage, check, is_remote
from selfsight.data.sources.tar_index import TarIndex

FEW = 256  # local shards that are indexed at once
OPEN_SHARDS = 64  # shards that a process keeps open
THREADS = 16  # reads in flight where shards are remote
LARGEST = 1 << 30  # bytes of a member; more is no image


class TarShards(Source):
    """All images of tar shards, in the order of the shards and of their members.

    The key of a sample is `shard:member`, the shard by its short name (see `listing`).

    Args:
        shards: path or address with braces, glob, folder, list file, or a list of these.
        cache: folder on a local disk in which remote shards are kept; None: they are read by
            ranges. Shards in it are taken as unchanging.
        cache_gb: limit of that folder, in 10^9 bytes, for all processes that share it; 0: no cache.
        index: folder in which the indexes of shards are saved; None: only those of cached shards
            are. An index beside its shard (`x.tar.index`) is always used.
        pieces: parts that a shard is cut into for the stream, where shards are permuted.
        whole_index: read all indexes at the start and permute single images; None: for up to 256
            local shards.
        grows: whether new shards join at the next pass; None: unless single images are permuted.
            They must appear under their final names when they are complete.
        retry_seconds: a remote read is given up when nothing, or too little, has come for so long.

    Raises:
        ValueError: nothing given, no such shard, a command (`pipe:`), and with `whole_index` no
            image in the shards, or one that is not a tar file.
    """

    per_process = ("_lock", "_guards", "_shards", "_failed", "_storage", "_cache", "_windows")
    per_process += ("_ahead", "_warned", "_pid")

    def __init__(
        self,
        shards: str | Sequence[str] | None,
        cache: str | None = None,
        cache_gb: float = 50.0,
        index: str | None = None,
        pieces: int = 16,
        whole_index: bool | None = None,
        grows: bool | None = None,
        retry_seconds: float = 120.0,
    ) -> None:
        if not shards:
            raise ValueError(
                "tar shards are needed: set data.shards=/path/to/shard-{000000..000012}.tar, or "
                "stream.shards in the site file."
            )
        if pieces < 1 or cache_gb < 0 or retry_seconds <= 0:
            raise ValueError(
                f"pieces={pieces}, cache_gb={cache_gb} and retry_seconds={retry_seconds} must be "
                "at least 1, not negative and positive."
            )
        self._asked = [shards] if isinstance(shards, str) else list(shards)
        self._folder = Path(cache).expanduser() if cache and cache_gb else None
        self._limit, self._seconds = int(cache_gb * 1e9), retry_seconds
        self._saved = Path(index).expanduser() if index else None
        self.name = title(self._asked[0])
        self._indexes: list[TarIndex] | None = None
        self._starts: np.ndarray | None = None
        self.prepare()
        listing = expand(self._asked, self._storage)
        self._root = listing.root
        self._list(listing.name, listing.addresses)
        remote = {a.split("://", 1)[0]: a for a in listing.addresses if is_remote(a)}
        for address in remote.values():
            check(address)
        self.threads = THREADS if remote else 0
        if whole_index is None:
            whole_index = not grows and not self.threads and len(listing.addresses) <= FEW
        if whole_index and grows:
            raise ValueError(
                "grows=true needs shards that are indexed when they are opened: leave whole_index "
                "at null, or set it to false."
            )
        self.flat, self.grows = whole_index, not whole_index and grows is not False
        self.pieces = 1 if whole_index else pieces
        if whole_index:
            self._index_all()

    def prepare(self) -> None:
        self._lock = threading.Lock()
        self._guards: dict[int, threading.Lock] = {}
        self._shards: OrderedDict[int, LocalShard | RemoteShard] = OrderedDict()
        self._failed: dict[int, tuple[float, OSError]] = {}
        self._storage = Storage(self._seconds)
        self._windows = Windows(self._storage)
        self._cache = None
        if self._folder is not None:
            self._cache = ShardCache(self._folder, self._limit, self._storage)
        self._ahead = ReadAhead(self)
        self._warned = False
        self._pid = os.getpid()

    # ------------------------------------------------------------------------ images by number

    def __len__(self) -> int:
        """Number of images; ValueError where not every index has been read or saved."""
        return int(self._ends()[-1])

    def key(self, index: int) -> str:
        return self._member_key(*self._place(index))

    def read(self, index: int) -> Record:
        return self._fetch(*self._place(index))

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, member) of an image."""
        ends = self._ends()
        shard = int(np.searchsorted(ends, index, side="right"))
        return shard, index - int(ends[shard - 1] if shard else 0)

    def _ends(self) -> np.ndarray:
        if self._starts is None:
            counts = []
            for shard in range(len(self._names)):
                count = self._known_length(shard)
                if count is None:
                    raise ValueError(
                        f"the number of images in {self.name} is not known before all of its "
                        f"{len(self._names)} shards are read: set images= or steps= instead of "
                        "epochs=, or data.whole_index=true."
                    )
                counts.append(count)
            self._starts = np.cumsum(counts, dtype=np.int64)
        return self._starts

    # ----------------------------------------------------------------- shards, for the stream

    def shards(self) -> int:
        return len(self) if self.flat else len(self._names)

    def length(self, shard: int, piece: int) -> int:
        if self.flat:
            return 1
        return len(self._span(len(self._opened(shard).index), piece))

    def fetch(self, shard: int, piece: int, member: int) -> Record:
        if self.flat:
            return self.read(shard)
        span = self._span(len(self._opened(shard).index), piece)
        return self._fetch(shard, span[member], span)

    def fetch_key(self, shard: int, piece: int, member: int) -> str:
        if self.flat:
            return self.key(shard)
        opened = self._shards.get(shard)
        if opened is None or member < 0:
            return self._names[shard]
        return self._member_key(shard, self._span(len(opened.index), piece)[member])

    def will_need(self, shard: int, piece: int) -> None:
        if not self.flat and shard not in self._shards:
            self._ahead.hint(shard)

    def _span(self, images: int, piece: int) -> range:
        """The members of a piece of a shard of so many images."""
        return range(images * piece // self.pieces, images * (piece + 1) // self.pieces)

    # ------------------------------------------------------------------------- a growing list

    def poll(self) -> list[str]:
        """Names of new shards, sorted. A list that cannot be read now has no news; it warns."""
        try:
            listing = expand(self._asked, self._storage)
        except ValueError as error:
            warnings.warn(
                f"no new shards are looked for now: {error}", RuntimeWarning, stacklevel=2
            )
            return []
        known = set(self.listing())
        news = {short(address, self._root): address for address in listing.addresses}
        return sorted(news.keys() - known)

    def extend(self, names: list[str]) -> None:
        addresses = {}
        if self._odd:  # what is not in a name has to be looked up
            with contextlib.suppress(ValueError):
                listed = expand(self._asked, self._storage).addresses
                addresses = {short(address, self._root): address for address in listed}
        self._set(self.listing() + names, self._odd | {n: a for n, a in addresses.items()})

    def listing(self) -> list[str]:
        return [self._names[i] for i in range(len(self._names))]

    def adopt(self, names: list[str]) -> None:
        """Replace the list by a recorded one; its names may be relative to another root."""
        addresses = [self._address(shard) for shard in range(len(self._names))]
        self._root = _old_root(addresses, self._root, names)
        self._set(names, {short(address, self._root): address for address in addresses})

    def fingerprint(self) -> str:
        text = "\0".join([*self.listing(), str(self.pieces), str(self.flat)])
        if self.flat:
            text += f"\0{len(self)}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return f"{len(self._names)} shards {digest}"

    def _list(self, name, addresses: Iterable[str]) -> None:
        by_name: dict[str, str] = {}
        for address in addresses:
            if by_name.setdefault(name(address), address) != address:
                raise ValueError(
                    f"two shards are named {name(address)} when the queries of their addresses "
                    "are left out: give each shard an address of its own."
                )
        self._set(list(by_name), by_name)

    def _set(self, names: list[str], addresses: dict[str, str]) -> None:
        """List those names; of the addresses, only those are kept that a name does not tell."""
        self._odd = {
            name: addresses[name]
            for name in names
            if name in addresses and addresses[name] != full(name, self._root)
        }
        self._names = StringTable(names)
        self._starts = None

    def _address(self, shard: int) -> str:
        name = self._names[shard]
        return self._odd.get(name) or full(name, self._root)

    # ------------------------------------------------------------------------------ one shard

    def _member_key(self, shard: int, member: int) -> str:
        index = self._indexes[shard] if self._indexes is not None else self._opened(shard).index
        return f"{self._names[shard]}:{index.names[member]}"

    def _fetch(self, shard: int, member: int, span: range | None = None) -> Record:
        opened = self._opened(shard)
        index = opened.index
        if index.sizes[member] > LARGEST:
            raise OSError(f"the member states {index.sizes[member]} bytes, more than any image")
        if index.offsets[member] + index.sizes[member] > opened.size:
            raise OSError("the shard ends within this member")
        try:
            data = opened.read(member, span)
        except OSError:
            with self._lock:  # a file that has gone stale is opened anew
                self._shards.pop(shard, None)
            raise
        label = int(index.labels[member])
        key = f"{self._names[shard]}:{index.names[member]}"
        return Record(key, data, None if label < 0 else label)

    def _opened(self, shard: int) -> LocalShard | RemoteShard:
        """The shard, open and indexed. One that failed fails at once until its time is over."""
        if self._pid != os.getpid():  # forked without being pickled
            self.prepare()
        with self._lock:
            opened = self._shards.get(shard)
            if opened is not None:
                self._shards.move_to_end(shard)
                return opened
            guard = self._guards.setdefault(shard, threading.Lock())
        with guard:
            with self._lock:
                opened = self._shards.get(shard)
                until, error = self._failed.get(shard, (0.0, None))
            if opened is not None:
                return opened
            if error is not None and time.monotonic() < until:
                raise type(error)(str(error))
            try:
                opened = self._open(shard)
            except OSError as error:
                kind = Gone if isinstance(error, Gone) else OSError
                with self._lock:
                    self._failed[shard] = (time.monotonic() + self._seconds, kind(str(error)))
                raise
            with self._lock:
                self._failed.pop(shard, None)
                self._guards.pop(shard, None)
                self._shards[shard] = opened
                while len(self._shards) > (
                    FEW if self.flat else OPEN_SHARDS
                ):  # closed when its last reader is done
                    self._shards.popitem(last=False)
            return opened

    def _open(self, shard: int) -> LocalShard | RemoteShard:
        address = self._address(shard)
        index = None if self._indexes is None else self._indexes[shard]
        if not is_remote(address):
            return LocalShard.open(Path(address), self._saved, index)
        if self._cache is not None:
            try:
                file = self._cache.open(address)
                return LocalShard(file, self._cache.path(address), self._saved, index, keep=True)
            except NoRoom as error:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"{error}; shards are read by ranges from now on where the cache has no "
                        "room.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return RemoteShard(address, self._storage, self._windows, self._saved, index)

    def _index_all(self) -> None:
        """Read the indexes of all shards; ValueError where one cannot be."""

        def index(shard: int) -> TarIndex:
            try:
                return self._opened(shard).index
            except tar_index.NotATar as error:
                raise ValueError(
                    f"the shard {self._names[shard]} is not an uncompressed tar file ({error}): "
                    "unpack or remove it."
                ) from None
            except OSError as error:
                raise ValueError(
                    f"the shard {self._names[shard]} cannot be read: {error}."
                ) from None

        with ThreadPoolExecutor(THREADS if self.threads else 4) as pool:
            self._indexes = list(pool.map(index, range(len(self._names))))
        if not len(self):
            raise ValueError(
                f"the {len(self._names)} shards of {', '.join(self._asked)} hold no image."
            )

    def _known_length(self, shard: int) -> int | None:
        """Images of a shard, if its index is at hand or saved."""
        if self._indexes is not None:
            return len(self._indexes[shard])
        opened = self._shards.get(shard)
        if opened is not None:
            return len(opened.index)
        address = self._address(shard)
        if is_remote(address):
            if self._cache is None:
                return None
            address = str(self._cache.path(address))
        with contextlib.suppress(OSError):
            index = LocalShard.saved(Path(address), self._saved)
            return None if index is None else len(index)
        return None


def _old_root(addresses: Sequence[str], root: str, names: Sequence[str]) -> str:
    """The root that recorded names are relative to: the one that explains most of them.

    A list file that has grown since may have moved the root; the first listed shard that is still
    there tells where it was.
    """
    today = {short(address, "") for address in addresses}
    some = names[:: 1 + len(names) // 1000]

    def explains(root: str) -> tuple[int, str]:
        return sum(full(name, root) in today for name in some), root

    if explains(root)[0] == len(some):
        return root
    for name in some:
        roots = [a.removesuffix(name) for a in today if a == name or a.endswith(f"/{name}")]
        if roots:
            return max(map(explains, sorted(roots)[:1000]))[1]
    return root
