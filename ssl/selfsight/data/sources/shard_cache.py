"""Remote shards on a local disk: whole ones in a folder of limited size, or windows in memory.

The folder is shared by all processes of a node. A shard is fetched into
`<key>.<size>.<version>.part` by the one process that holds the lock of that file, goes on where
another was cut, and is renamed when it is whole; the least recently used shards make room. Locks
are the kernel's (`flock`), so those of a dead process are gone. A reader holds a shared lock on its
shard: that one is not removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

from selfsight.data.sources.storage import CannotWrite, Storage, public
from selfsight.data.sources.tar_index import beside

_PAUSE = 0.05  # seconds between looks at a lock that another process holds
_NO_LOCKS = "the file system of the cache does not support file locks: choose a local disk"
_GRACE = 10.0  # seconds beyond the patience of that process


class NoRoom(OSError):
    """The shard cannot be kept on this disk."""


class ShardCache:
    """A folder of shards. Make one in each process; its methods may be called from any thread.

    Args:
        folder: on a local disk; locks on network file systems are not reliable.
        limit: bytes of all shards in it, also of those that are being fetched.
        storage: what fetches them.
    """

    def __init__(self, folder: Path, limit: int, storage: Storage) -> None:
        self.folder, self.limit, self._storage = folder, limit, storage

    def path(self, address: str) -> Path:
        """Where the shard of an address is, once it is fetched."""
        return self.folder / f"{_key(address)}.tar"

    def open(self, address: str) -> int:
        """A file descriptor of the whole shard, which is fetched if it is not here.

        Shards are taken as unchanging: what is in the folder is not compared with the store.

        Raises:
            NoRoom: the disk is full, or all that is in the folder is in use. Gone, OSError: the
                shard cannot be fetched.
        """
        path = self.path(address)
        file = _open_whole(path)
        if file is not None:
            return file
        stat = self._storage.stat(address)
        if stat.size > self.limit:
            raise NoRoom(
                f"{public(address)} has {stat.size} bytes, more than the limit of the cache "
                f"{self.folder}: raise data.cache_gb"
            )
        tag = hashlib.sha256(stat.version.encode()).hexdigest()[:8]
        part = self.folder / f"{_key(address)}.{stat.size}.{tag}.part"
        watched = (-1, 0.0)
        while True:
            file = _open_whole(path)
            if file is not None:
                return file
            file = self._open_part(part)
            if not _lock(file, fcntl.LOCK_EX):
                have = os.fstat(file).st_size
                os.close(file)
                now = time.monotonic()
                if have != watched[0]:
                    watched = (have, now)
                elif now - watched[1] > self._storage.seconds + _GRACE:
                    raise OSError(f"another process fetches {public(address)} and does not get on")
                time.sleep(_PAUSE)
                continue
            try:
                # Ours now, unless it was renamed or removed between opening and locking it.
                if not _same(part, file):
                    continue
                if path.exists():
                    part.unlink()
                    continue
                self._make_room(stat.size, part)
                self._storage.download(address, file, os.fstat(file).st_size, stat)
                _flush(file)
                part.replace(path)
            except CannotWrite as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise NoRoom(f"the cache {self.folder} cannot be written ({error})") from None
            except OSError:
                with contextlib.suppress(OSError):
                    if os.fstat(file).st_size == 0:
                        part.unlink()
                raise
            finally:
                os.close(file)

    def _open_part(self, part: Path) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NoRoom(
                f"the cache {self.folder} cannot be written ({error.strerror or error})"
            ) from None

    def _make_room(self, size: int, own: Path) -> None:
        """Remove the least recently used files until `size` more bytes fit under the limit."""
        guard = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)  # held for the time of a listing
            files = [(s.st_atime_ns, n, p) for p, n, s in _held(self.folder) if p != own]
            total = size + sum(n for _, n, _ in files)
            for _, length, path in sorted(files):
                if total <= self.limit:
                    break
                if _remove_unused(path):
                    total -= length
            if total > self.limit:
                raise NoRoom(
                    f"all shards in the cache {self.folder} are in use and fill it: raise "
                    "data.cache_gb"
                )
        finally:
            os.close(guard)


def _key(address: str) -> str:
    return hashlib.sha256(public(address).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _open_whole(path: Path) -> int | None:
    """The descriptor of a shard that is here, locked against removal and marked as just used."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:  # most often it is not there; if it is something else, fetching it says what
        return None
    try:  # blocks only for the moment in which a remover looks whether it may have the file
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        os.close(file)
        raise NoRoom(_NO_LOCKS) from None
    if not _same(path, file):
        os.close(file)
        return None
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), os.fstat(file).st_mtime_ns))
    return file


def _flush(file: int) -> None:
    """Have the bytes on the disk before the file gets its name: a power cut must not tear it."""
    try:
        os.fsync(file)
    except OSError as error:
        raise CannotWrite(error.strerror or str(error)) from None


def _held(folder: Path):
    """(path, bytes, status) of all shards and parts; a part counts as much as it will have."""
    for path in folder.iterdir():
        if path.suffix not in (".tar", ".part") or path.name.startswith("."):
            continue
        try:
            status = path.stat()
        except OSError:
            continue
        words = path.name.split(".")
        stated = len(words) == 4 and words[1].isdecimal()
        yield path, int(words[1]) if stated else status.st_size, status


def _remove_unused(path: Path) -> bool:
    """Remove a file that no process reads or writes; False where one does."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _lock(file, fcntl.LOCK_EX):
            return False
        if _same(path, file):
            path.unlink()
            beside(path).unlink(missing_ok=True)
        return True
    finally:
        os.close(file)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise NoRoom(_NO_LOCKS) from None


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


class Windows:
    """Stretches of remote shards in memory, each read once, by whichever thread comes first.

    A stretch that had to make room before all of it was used is not read again as a whole: its
    images are then asked for one by one, so that too little memory costs requests, not traffic.

    Args:
        storage: what reads them.
        limit: bytes of all stretches together.
    """

    def __init__(self, storage: Storage, limit: int = 512 << 20) -> None:
        self._storage, self._limit = storage, limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int], _Window] = OrderedDict()
        self._dropped: set[tuple[str, int, int]] = set()
        self._bytes = 0

    def read(
        self, address: str, version: str, offset: int, size: int, first: int, end: int, uses: int
    ) -> bytes:
        """`size` bytes at `offset`, out of the stretch `first` to `end` where that is short enough.

        Args:
            uses: reads after which the stretch is not needed any more.
        """
        key = (address, first, end)
        with self._lock:
            window = self._kept.get(key)
            if window is not None:
                self._kept.move_to_end(key)
            elif end - first <= self._storage.window and key not in self._dropped:
                window = self._kept[key] = _Window(uses)
                self._bytes += end - first
                self._shrink()
        if window is None:
            return self._storage.read(address, offset, size, version)
        try:
            with window.lock:
                if window.data is None:
                    window.data = self._storage.read(address, first, end - first, version)
                data = window.data[offset - first : offset - first + size]
        except OSError:
            self._forget(key, window)
            raise
        with self._lock:
            window.uses -= 1
        if window.uses <= 0:
            self._forget(key, window)
        return data

    def _forget(self, key: tuple[str, int, int], window: _Window) -> None:
        with self._lock:
            if self._kept.get(key) is window:  # not yet gone, nor another one of that place
                del self._kept[key]
                self._bytes -= key[2] - key[1]

    def _shrink(self) -> None:
        while self._bytes > self._limit and len(self._kept) > 1:
            key, _ = self._kept.popitem(last=False)
            self._bytes -= key[2] - key[1]
            if len(self._dropped) > 100_000:
                self._dropped.clear()
            self._dropped.add(key)


class _Window:
    """One stretch: its bytes once they are read, and how many reads are still expected."""

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self.lock = threading.Lock()
        self.data: bytes | None = None
