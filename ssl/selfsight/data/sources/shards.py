"""Tar shards in the layout of WebDataset, on local disks.

Members whose names agree up to the first dot of the file name belong together: `000123.jpg`, its
label `000123.cls` (an integer as text) and side files such as `000123.json`. The headers of a shard
are read once; an image is then one positioned read. Nothing is extracted or unpickled, so names
that point outside the shard and hostile side files have no effect. An extension decides only what
is a side file, since on the web it often lies about the format.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Record, Source, StringTable

# Members that are not images: labels, captions, metadata, arrays, and pickles.
# fmt: off
SIDE_FILES = frozenset([
    "cls", "cls2", "json", "jsonl", "txt", "text", "caption", "csv", "tsv", "id", "index",
    "npy", "npz", "pt", "pth", "pyd", "pkl", "pickle", "msg", "mp", "safetensors",
])
# fmt: on
OPEN_FILES = 256  # shards kept open in a process; of more shards, each read opens its own


class TarShards(Source):
    """All images of tar shards, in the order of the shards and of their members.

    `shards` is a path, or a list of them, in any of these forms: `train-{000000..000012}.tar`,
    `{train,val}-000000.tar`, a glob, a folder (its `*.tar`), or a text file ending in `.txt` or
    `.list` with one of these a line, relative to itself. The key of a sample is `shard:member`, the
    shard relative to the folder that all shards share.

    Raises:
        ValueError: nothing given, no such shard, no image in the shards, not a tar file, a remote
            address or a command (`pipe:`).
    """

    per_process = ("_lock", "_files")

    def __init__(self, shards: str | Sequence[str] | None) -> None:
        if not shards:
            raise ValueError(
                "tar shards are needed: set data.shards=/path/to/shard-{000000..000012}.tar, or "
                "stream.shards in the site file."
            )
        asked = [shards] if isinstance(shards, str) else list(shards)
        self._shards = [path for item in asked for path in expand(item)]
        if not self._shards:
            raise ValueError(f"the list of shards {', '.join(asked)} is empty.")
        absolute = [path.absolute() for path in self._shards]
        common = Path(os.path.commonpath([path.parent for path in absolute]))
        self._names = [path.relative_to(common).as_posix() for path in absolute]
        self.name = common.name or "shards"
        members: list[str] = []
        places: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(self._shards):
            for name, offset, size, label in _index(path):
                members.append(name)
                places.append((number, offset, size, label))
        if not members:
            raise ValueError(f"the {len(self._shards)} shards of {', '.join(asked)} hold no image.")
        self._members = StringTable(members)
        self._places = np.array(places, dtype=np.int64)
        self.prepare()

    def prepare(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def key(self, index: int) -> str:
        return f"{self._names[self._places[index, 0]]}:{self._members[index]}"

    def read(self, index: int) -> Record:
        shard, offset, size, label = self._places[index].tolist()
        keep = len(self._shards) <= OPEN_FILES
        file = self._open(shard) if keep else os.open(self._shards[shard], os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
        finally:
            if not keep:
                os.close(file)
        if len(data) < size:
            raise OSError("the shard ends within this member")
        return Record(self.key(index), data, None if label < 0 else label)

    def _open(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
            return self._files[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def expand(item: str, folder: Path = Path()) -> list[Path]:
    """The shard files that one item of a list names, in order; relative ones lie in `folder`."""
    if item.startswith("pipe:"):
        raise ValueError(f"{item} would run a command, which is not supported: name tar files.")
    if "://" in item:
        raise ValueError(f"{item} is a remote address: only local tar files can be read.")
    found: list[Path] = []
    for name in expand_braces(item):
        path = folder / Path(name).expanduser()
        if path.is_dir():
            matches = sorted(path.glob("*.tar"))
        elif path.exists():
            matches = [path]
        else:  # glob.glob, since Path.glob takes no absolute pattern
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        if not matches:
            raise ValueError(f"no shard is found at {path}: check the path of the shards.")
        for match in matches:
            if match.suffix in (".txt", ".list"):
                lines = [line.strip() for line in match.read_text().splitlines()]
                inner = [line for line in lines if line and not line.startswith("#")]
                found += [p for line in inner for p in expand(line, match.parent)]
            else:
                found.append(match)
    return found


def expand_braces(text: str) -> list[str]:
    """Expand `{000..012}` (keeping leading zeros) and `{a,b}`, the leftmost outermost."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        return [text]
    first, last, words = match.groups()
    if words is not None:
        inner = words.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        digits = len(first) if first.startswith("0") or last.startswith("0") else 0
        inner = [f"{n:0{digits}d}" for n in range(int(first), int(last) + step, step)]
    head, tail = text[: match.start()], text[match.end() :]
    return [head + word + rest for word in inner for rest in expand_braces(tail)]


def _index(path: Path) -> list[tuple[str, int, int, int]]:
    """(member, offset, size, label or -1) of each image of a shard. A cut end is tolerated."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            while member := _next(tar):
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                if not base or base.startswith("."):
                    continue
                stem, _, extension = base.partition(".")
                sample = f"{folder}/{stem}"
                extension = extension.lower().rpartition(".")[2]
                if extension == "cls":
                    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
                    if text.strip().isdigit():
                        labels[sample] = int(text)
                elif extension not in SIDE_FILES:
                    images.append((sample, member.name, member.offset_data, member.size))
    except tarfile.ReadError as error:
        raise ValueError(
            f"the shard {path} is not an uncompressed tar file ({error}): unpack or remove it."
        ) from None
    return [(name, offset, size, labels.get(s, -1)) for s, name, offset, size in images]


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; None at the end, and where a shard that was cut short or damaged stops."""
    try:
        return tar.next()
    except tarfile.TarError:
        return None
