"""Very many file names in little memory, and saved: the list behind a folder of images.

A saved list is one line of JSON about it, then one relative path a line, in bytes as the file
system has them; a backslash is written as two, and a newline as a backslash and an n. Only the
place of every 64th line is held in memory, the text itself is mapped from the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

_EVERY = 64  # lines between two places that are held
_CHUNK = 1 << 24
_FORMAT, _VERSION = "selfsight image list", 1


class FileList:
    """File names by number. Made by `ListWriter.in_memory` or `FileList.open`.

    Attributes:
        classes: names of the classes, or None.
        digest: hash of all names in order.
    """

    def __init__(
        self, text: bytearray | bytes | mmap.mmap, begin: int, header: dict, file: Path | None
    ) -> None:
        self.classes: list[str] | None = header["classes"]
        self.digest: str = header["digest"]
        self._text, self._file, self._header = text, file, header
        places, self._count = [np.array([begin])], 0
        digest = blake2b(digest_size=8)
        for start in range(begin, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            following = (-self._count - 1) % _EVERY  # the first line end before a line that is held
            places.append(start + ends[following::_EVERY] + 1)
            self._count += len(ends)
        self._places = np.concatenate(places)
        if digest.hexdigest() != self.digest or self._count != header["images"]:
            raise ValueError(
                f"the list {file} is damaged, or was changed after it was written: delete it, and "
                "the folder is scanned again."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} files, there is no file {index}.")
        block, line = divmod(index, _EVERY)
        end = self._places[block + 1] if block + 1 < len(self._places) else len(self._text)
        name = bytes(self._text[self._places[block] : end]).split(b"\n", line + 1)[line]
        return _unescape(name) if b"\\" in name else name

    @classmethod
    def open(cls, file: Path, folder: str, labels: str | None) -> FileList:
        """Open the list of `folder` with that setting of labels.

        Raises:
            ValueError: it cannot be read, is not a list, is damaged, or is of something else.
        """
        try:
            text, begin, header = _read(file)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"the list {file} cannot be read: {reason}.") from None
        if header["folder"] != folder:
            raise ValueError(
                f"the list {file} is of the folder {header['folder']}, not of {folder}: name "
                "another file in data.list, or delete it, and the folder is scanned again."
            )
        if header["labels"] != labels:
            raise ValueError(
                f"the list {file} was made with labels={header['labels'] or 'null'}, not "
                f"{labels or 'null'}: name another file in data.list, or delete it."
            )
        return cls(text, begin, header, file)

    def __getstate__(self) -> dict:
        """A saved list is opened again in another process, another one is sent."""
        kept = "" if self._file is None else "_text"
        return {k: v for k, v in vars(self).items() if k != kept}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self._file is not None:
            self._text, _, header = _read(self._file)
            if header != self._header:
                raise ValueError(f"the list {self._file} was replaced while it was in use.")


class ListWriter:
    """Collects file names. `first_folders` are the first parts of all that have more than one."""

    def __init__(self, folder: str, labels: str | None) -> None:
        self.first_folders: set[bytes] = set()
        self.classes: list[str] | None = None
        self._folder, self._labels = folder, labels
        self._text, self._count = bytearray(), 0

    def __len__(self) -> int:
        return self._count

    def add(self, prefix: bytes, names: list[bytes]) -> None:
        """Append the files `names` of the folder `prefix`, which ends in a slash or is empty."""
        if not names:
            return
        if prefix:
            self.first_folders.add(prefix.partition(b"/")[0])
        lines = prefix + (b"\n" + prefix).join(names) + b"\n"
        if b"\\" in lines or lines.count(b"\n") != len(names):
            lines = b"".join(_escape(prefix + name) + b"\n" for name in names)
        self._text += lines
        self._count += len(names)

    def in_memory(self) -> FileList:
        """The list of what was added. Nothing can be added any more."""
        return FileList(self._text, 0, self._header(), None)

    def save(self, file: Path) -> None:
        """Write it to `file`, compressed if that ends in .gz: whole, or not at all.

        Raises:
            ValueError: it cannot be written.
        """
        header = json.dumps(self._header()).encode() + b"\n"
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as raw:
                if file.suffix == ".gz":
                    with gzip.GzipFile("", "wb", 3, raw, mtime=0) as packed:
                        packed.write(header)
                        packed.write(self._text)
                else:
                    raw.write(header)
                    raw.write(self._text)
                raw.flush()
                os.fsync(raw.fileno())
            part.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise ValueError(f"the list {file} cannot be written: {error.strerror}.") from None

    def _header(self) -> dict:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "folder": self._folder,
            "labels": self._labels,
            "images": self._count,
            "digest": blake2b(self._text, digest_size=8).hexdigest(),
            "classes": self.classes,
        }


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the right to make `file`, which one process has at a time; others wait.

    On a file system without locks nobody waits, and each makes it.

    Raises:
        ValueError: nothing can be written beside `file`.
    """
    path = file.with_name(f".{file.name}.lock")
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"the list {file} cannot be written: {error.strerror}.") from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    break
        except OSError:
            break
        os.close(handle)  # who had it before has removed it: others hold a new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _read(file: Path) -> tuple[bytes | mmap.mmap, int, dict]:
    """The text of a list, where its lines begin, and its header."""
    strange = (
        f"{file} is not a list of images of this version, or is damaged: name another file in "
        "data.list, or delete it, and the folder is scanned again."
    )
    with file.open("rb") as raw:
        text: bytes | mmap.mmap
        if file.suffix == ".gz":
            text = _unpacked(raw, strange)
        elif os.fstat(raw.fileno()).st_size:
            text = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            raise ValueError(strange)
    end = text.find(b"\n")
    try:
        header = json.loads(text[: max(end, 0)])
    except ValueError:  # also for bytes that are no text
        raise ValueError(strange) from None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (
        _FORMAT,
        _VERSION,
    ):
        raise ValueError(strange)
    if {"folder", "labels", "images", "digest", "classes"} - header.keys():
        raise ValueError(strange)
    return text, end + 1, header


def _unpacked(raw: BinaryIO, strange: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=raw) as packed:
            return packed.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(strange) from None


def _escape(name: bytes) -> bytes:
    return name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


def _unescape(name: bytes) -> bytes:
    return b"\\".join(part.replace(b"\\n", b"\n") for part in name.split(b"\\\\"))
