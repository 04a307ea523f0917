"""One open shard: its index, and its images by position."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from selfsight.data.sources import tar_index
from selfsight.data.sources.shard_cache import Windows
from selfsight.data.sources.source import Gone
from selfsight.data.sources.storage import Storage, public
from selfsight.data.sources.tar_index import TarIndex


class LocalShard:
    """A shard on a local disk; closed when it is no longer referred to.

    Args:
        file: its descriptor, which is taken over.
        path: its path.
        saved: folder of saved indexes, or None.
        index: its index, if that is known.
        keep: whether an index that had to be made is saved beside it.

    Raises:
        OSError: it cannot be read, or is not a tar file.
    """

    def __init__(
        self, file: int, path: Path, saved: Path | None, index: TarIndex | None, keep: bool = False
    ) -> None:
        self._file = file
        status = os.fstat(file)
        self.size = status.st_size
        self.index = index or _saved(path, status, saved) or self._made(path, status, saved, keep)

    @classmethod
    def open(cls, path: Path, saved: Path | None, index: TarIndex | None) -> LocalShard:
        return cls(_descriptor(path), path, saved, index)

    @staticmethod
    def saved(path: Path, saved: Path | None) -> TarIndex | None:
        """The saved index of a shard, which is not opened."""
        return _saved(path, path.stat(), saved)

    def read(self, member: int, span: range | None) -> bytes:
        """The bytes of one image."""
        size = int(self.index.sizes[member])
        data = os.pread(self._file, size, int(self.index.offsets[member]))
        if len(data) < size:
            raise OSError("the shard ends within this member")
        return data

    def _made(self, path: Path, status: os.stat_result, saved: Path | None, keep: bool) -> TarIndex:
        index = tar_index.scan(lambda offset, size: os.pread(self._file, size, offset))
        with contextlib.suppress(OSError):  # saving it is a convenience
            if saved is not None:
                place = tar_index.place(saved, str(path), status.st_size, str(status.st_mtime_ns))
                data = tar_index.dump(index, status.st_size, str(status.st_mtime_ns))
                tar_index.save(place, data)
            elif keep:
                data = tar_index.dump(index, status.st_size, "")
                tar_index.save(tar_index.beside(path), data)
        return index

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._file)


class RemoteShard:
    """A shard that is read by ranges.

    Raises:
        Gone: it is not there. OSError: it cannot be read, not in parts, or is not a tar file.
    """

    def __init__(
        self,
        address: str,
        storage: Storage,
        windows: Windows,
        saved: Path | None,
        index: TarIndex | None,
    ) -> None:
        self._address, self._storage, self._windows = address, storage, windows
        stat = storage.stat(address)
        self.size, self._version = stat.size, stat.version
        if not stat.ranges:
            storage.read(address, 0, 1)  # says so
        self.index = index or self._find(saved)

    def read(self, member: int, span: range | None) -> bytes:
        """The bytes of one image; of a piece, it may keep others of it at hand."""
        index = self.index
        offset, size = int(index.offsets[member]), int(index.sizes[member])
        first, end = offset, offset + size
        if span is not None:
            piece = slice(span.start, span.stop)
            first = int(index.offsets[piece].min())
            end = min(self.size, int((index.offsets[piece] + index.sizes[piece]).max()))
        return self._windows.read(
            self._address, self._version, offset, size, first, end, len(span or "1")
        )

    def _find(self, saved: Path | None) -> TarIndex:
        place = None
        if saved is not None:
            place = tar_index.place(saved, public(self._address), self.size, self._version)
            with contextlib.suppress(OSError):
                index = tar_index.parse(place.read_bytes(), self.size, self._version)
                if index is not None:
                    return index
        head, mark, query = self._address.partition("?")
        index = None
        with contextlib.suppress(OSError):  # most shards have none beside them
            data = self._storage.whole(f"{head}.index{mark}{query}")
            index = tar_index.parse(data, self.size, None)
        if index is None:
            index = tar_index.scan(_Sliding(self._address, self._storage, self.size, self._version))
        if place is not None:
            with contextlib.suppress(OSError):
                tar_index.save(place, tar_index.dump(index, self.size, self._version))
        return index


class _Sliding:
    """Reads of a few bytes in rising order, out of one large window after the other."""

    def __init__(self, address: str, storage: Storage, size: int, version: str) -> None:
        self._address, self._storage = address, storage
        self._size, self._version = size, version
        self._start, self._data = 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self._size - offset))
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            length = min(max(self._storage.window, size), self._size - offset)
            self._data = self._storage.read(self._address, offset, length, self._version)
            self._start, at = offset, 0
        return self._data[at : at + size]


def _descriptor(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise Gone(f"{path} is not there") from None


def _saved(path: Path, status: os.stat_result, saved: Path | None) -> TarIndex | None:
    version = str(status.st_mtime_ns)
    if saved is not None:
        place = tar_index.place(saved, str(path), status.st_size, version)
        with contextlib.suppress(OSError):
            index = tar_index.parse(place.read_bytes(), status.st_size, version)
            if index is not None:
                return index
    return tar_index.read_beside(path, status)
