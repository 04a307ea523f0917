"""A folder of image files, of any depth, scanned once or listed in a file."""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from selfsight.data.sources.file_list import FileList, ListWriter, locked
from selfsight.data.sources.source import IMAGE_EXTENSIONS, Record, Source

_EXTENSIONS = tuple(f".{e}".encode() for e in sorted(IMAGE_EXTENSIONS))
_MAX_BYTES = 2**30  # no image file; what a decoder may be given is limited further by the loader
_AHEAD = 4  # folders read ahead by each thread, at each depth


class ImageFolder(Source):
    """All image files below `path`, sorted by name within each folder, folders among the files.

    Files are chosen by extension; hidden files and folders (a leading dot) are left out; links to
    folders are followed. With `labels="folders"` the class of an image is the first folder below
    `path`, numbered in sorted order, where there are at least two such folders; files directly in
    `path` have no label. The key of a sample is its path relative to `path`.

    Args:
        path: the folder.
        labels: "folders" or None.
        list: a file that names the images. If there is none, the folder is scanned and the file
            written; from then on the file is believed and the folder is not looked through (a file
            that is gone since is an OSError when it is read). Processes that find none at the same
            time wait for the one that writes it. Ending in .gz it is compressed, and each process
            holds it in memory; uncompressed, all processes of a machine share one copy of it,
            which is better from some million files on.
        threads: folders that are read at a time; more than 1 helps where a file system answers
            slowly. The order does not depend on it.

    Raises:
        ValueError: no path given, no such folder, a folder that cannot be read, no image in it; a
            list that cannot be written, is damaged, or is of another folder or setting of labels.
    """

    def __init__(
        self,
        path: str | None,
        labels: Literal["folders"] | None = None,
        list: str | None = None,  # noqa: A002 (the name of the key)
        threads: int = 8,
    ) -> None:
        if path is None:
            raise ValueError("a folder of images is needed: set data.path=/path/to/images.")
        if labels not in ("folders", None):
            raise ValueError(f'labels={labels!r} is unknown: use "folders" or null.')
        if threads < 1:
            raise ValueError(f"a folder is scanned by at least 1 thread, not {threads}.")
        self.root = Path(path).expanduser()
        self.name = Path(os.path.realpath(self.root)).name
        self._base = os.fsencode(self.root) + b"/"
        if list is None:
            self._paths = _scanned(self.root, labels, threads).in_memory()
        else:
            file = Path(list).expanduser()
            if not file.exists():
                with locked(file):
                    if not file.exists():  # another process may have made it meanwhile
                        _scanned(self.root, labels, threads).save(file)
            self._paths = FileList.open(file, folder=os.path.realpath(self.root), labels=labels)
        self.classes = self._paths.classes
        self._numbers = {os.fsencode(name): n for n, name in enumerate(self.classes or ())}

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def labels(self) -> np.ndarray | None:
        firsts = (self._paths[index].partition(b"/") for index in range(len(self)))
        numbers = (self._numbers.get(first, -1) if rest else -1 for first, _, rest in firsts)
        return np.fromiter(numbers, np.int64, len(self))

    def read(self, index: int) -> Record:
        path = self._paths[index]
        try:
            with open(self._base + path, "rb") as file:  # noqa: PTH123 (names are bytes)
                if (size := os.fstat(file.fileno()).st_size) > _MAX_BYTES:
                    raise OSError(errno.EFBIG, f"its {size} bytes are no image")
                data = file.read()
        except OSError as error:
            raise OSError(f"{self.key(index)} cannot be read: {error.strerror}") from None
        first, _, rest = path.partition(b"/")
        return Record(os.fsdecode(path), data, self._numbers.get(first) if rest else None)

    def fingerprint(self) -> str:
        """The number of images and a hash of their paths, in order."""
        return f"{len(self)} images, {self._paths.digest}"


def _scanned(root: Path, labels: str | None, threads: int) -> ListWriter:
    """The list of the images below `root`."""
    if not root.exists():
        raise ValueError(f"the image folder {root} does not exist.")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the images.")
    found = ListWriter(os.path.realpath(root), labels)
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        try:
            files = _walk(pool, threads * _AHEAD, os.fsencode(root), found)
        except OSError as error:
            where = os.fsdecode(error.filename) if error.filename else root
            raise ValueError(f"the folder {where} cannot be read: {error.strerror}.") from None
        finally:
            pool.shutdown(cancel_futures=True)
    if not len(found):
        raise ValueError(
            f"the image folder {root} is empty."
            if not files
            else f"the folder {root} holds no images ({files} other files): looked for "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}."
        )
    if labels == "folders" and len(found.first_folders) > 1:
        found.classes = sorted(os.fsdecode(name) for name in found.first_folders)
    return found


class _Folder(NamedTuple):
    """What one folder holds, compact while it waits for its turn."""

    identity: tuple[int, int]
    names: bytes  # of images and folders, sorted, each followed by a NUL
    folders: set[bytes]  # those which are folders
    files: int  # of any kind


def _read(path: bytes) -> _Folder:
    """Read one folder. One that has just been removed is empty."""
    names, folders, files = [], set(), 0
    try:
        status = os.stat(path)  # noqa: PTH116 (names are bytes)
        with os.scandir(path) as listed:
            for entry in listed:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.add(name)
                    names.append(name)
                elif entry.is_file():
                    files += 1
                    if name.lower().endswith(_EXTENSIONS):
                        names.append(name)
    except FileNotFoundError:
        return _Folder((0, 0), b"", set(), 0)
    # Sorted by bytes, so that the order depends neither on the file system nor on the locale.
    names.sort()
    joined = b"\0".join([*names, b""])
    return _Folder((status.st_dev, status.st_ino), joined, folders, files)


def _walk(pool: ThreadPoolExecutor, ahead: int, root: bytes, found: ListWriter) -> int:
    """Collect the images below `root` in order; return the number of all files.

    At each depth, so many of the folders that come next are read ahead by the pool.
    """
    top = _read(root)
    files = top.files
    stack = [_Level(pool, ahead, root, b"", top, frozenset())]
    while stack:
        level = stack[-1]
        name = level.advance(found)
        if name is None:
            stack.pop()
            continue
        folder = level.reading.popleft().result()
        if folder.identity in level.above:  # a link back to a folder above: the same files again
            continue
        files += folder.files
        prefix = level.prefix + name + b"/"
        stack.append(_Level(pool, ahead, root, prefix, folder, level.above))
    return files


class _Level:
    """A folder that is being gone through: its names from some place on, and its folders ahead."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        ahead: int,
        root: bytes,
        prefix: bytes,
        folder: _Folder,
        above: frozenset[tuple[int, int]],
    ) -> None:
        self.prefix, self.above = prefix, above | {folder.identity}
        self._names, self._folders = folder.names.split(b"\0")[:-1], folder.folders
        self._next = 0
        self._pool, self._ahead, self._root = pool, ahead, root
        self._waiting = deque(name for name in self._names if name in folder.folders)
        self.reading: deque[Future[_Folder]] = deque()  # the next folders, in order

    def advance(self, found: ListWriter) -> bytes | None:
        """Add the files before the next folder to `found`; the name of that, None at the end."""
        start = self._next
        if not self._folders:
            self._next = len(self._names)
        while self._next < len(self._names) and self._names[self._next] not in self._folders:
            self._next += 1
        found.add(self.prefix, self._names[start : self._next])
        if self._next == len(self._names):
            return None
        while self._waiting and len(self.reading) < self._ahead:
            path = self._root + b"/" + self.prefix + self._waiting.popleft()
            self.reading.append(self._pool.submit(_read, path))
        self._next += 1
        return self._names[self._next - 1]
