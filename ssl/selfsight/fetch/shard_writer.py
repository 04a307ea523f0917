"""Tar shards that appear whole, and that a kill does not empty.

A shard is written as `shard-000000.tar.part`: for each image its file and then its JSON, which
holds the image's hash. A name without `.part` is a complete shard. Opened again after a kill, the
images whose JSON is there and whose hash is right are kept, and writing goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

BLOCK = 512
END = bytes(2 * BLOCK)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Adds images to one shard. Not for several threads at once.

    Attributes:
        entries: the JSON of each image in it, by the number of its row.
        image_bytes: size of its images together.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / shard_name(number)
        self.part = self.path.with_name(self.path.name + ".part")
        self.entries: dict[int, dict[str, Any]] = {}
        self.image_bytes = 0
        descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def add(self, row: int, data: bytes, extension: str, entry: dict[str, Any]) -> None:
        """Append an image and its entry, which holds its `sha256`."""
        key = f"{row:010d}"
        side = json.dumps({"key": key, **entry}, ensure_ascii=False).encode("utf-8", "replace")
        self._file.write(_member(f"{key}.{extension}", data) + _member(f"{key}.json", side))
        self._file.flush()  # with the system, it outlives this process
        self.entries[row] = entry
        self.image_bytes += len(data)

    def suspend(self) -> None:
        """Close it as it is, to be opened again later."""
        self._file.close()

    def complete(self) -> None:
        """Write the end, and wait until all of it is on the disk. It still has its `.part` name."""
        self._file.write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _recover(self) -> None:
        """Read what is there, and cut behind the last whole image."""
        whole = 0
        image: tuple[str, bytes] | None = None
        while member := self._next():
            name, data = member
            if not name.endswith(".json"):
                image = member
                continue
            try:
                entry = json.loads(data)
                row = int(name.removesuffix(".json"))
                fits = image is not None and entry["sha256"] == hashlib.sha256(image[1]).hexdigest()
            except (ValueError, KeyError, TypeError):
                break
            if image is None or not fits:
                break
            self.entries[row] = entry
            self.image_bytes += len(image[1])
            whole, image = self._file.tell(), None
        self._file.seek(whole)
        self._file.truncate()

    def _next(self) -> tuple[str, bytes] | None:
        """Name and content of the next member; None where there is no whole one."""
        header = self._file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        padding = -info.size % BLOCK
        if info.size < 0 or info.size + padding > left:
            return None
        data = self._file.read(info.size)
        self._file.seek(padding, os.SEEK_CUR)
        return info.name, data


def publish(part: Path) -> Path:
    """Give a complete shard its name, so that it survives a power cut; returns the new path."""
    path = part.with_name(part.name.removesuffix(".part"))
    part.replace(path)
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _member(name: str, data: bytes) -> bytes:
    """Header, content and padding of a file in a tar archive (ustar); no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
