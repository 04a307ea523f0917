"""The index of a tar shard: where each image lies in it, found by one pass over its headers.

Members whose names agree up to the first dot of the file name belong together: `000123.jpg`, its
label `000123.cls` (an integer as text) and side files such as `000123.json`. Only regular files
count; links, devices, folders and sparse files are passed over, and nothing is extracted, so names
that point elsewhere have no effect. An extension decides only what is a side file, since on the web
it often lies about the format.

Formats read: v7, ustar, GNU (long names, base-256 numbers) and pax (POSIX.1-2001: `path`, `size`).
What stands before a cut or a damaged header is kept; a member whose bytes end early is listed, so
that it fails by its name when it is read.

An index is saved as one file, which holds no code: a line that names the format, the SHA-256 of all
that follows, the length of a JSON header (4 bytes), the header, then per image its offset, size,
label and the end of its name (int64, little endian), and the names. `x.tar.index` beside a shard
`x.tar` is used where it fits the shard's size and is not older.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsight.data.sources.source import StringTable

# Members that are not images: labels, captions, metadata, arrays, and pickles.
# fmt: off
SIDE_FILES = frozenset([
    "cls", "cls2", "json", "jsonl", "txt", "text", "caption", "csv", "tsv", "id", "index",
    "npy", "npz", "pt", "pth", "pyd", "pkl", "pickle", "msg", "mp", "safetensors",
])
# fmt: on
MAGIC = b"selfsight tar index 1\n"
BLOCK = 512
LONG_NAME = 1 << 20  # bytes of a long name or of pax records; more is taken for damage
_LARGEST = 1 << 62  # bytes of a member; more is taken for damage
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LEFT_END = len(MAGIC) + 32 + 4

Reader = Callable[[int, int], bytes]
"""(offset, size) -> those bytes, fewer where the shard ends."""


class NotATar(OSError):
    """The shard does not begin as an uncompressed tar file."""


@dataclass
class TarIndex:
    """The images of one shard, in its order.

    Attributes:
        names: member names.
        offsets: int64 (images,), where the bytes of each begin.
        sizes: int64 (images,), their number.
        labels: int64 (images,), -1 for none.
    """

    names: StringTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)


def scan(read: Reader) -> TarIndex:
    """Index a shard by its headers.

    Raises:
        NotATar: the first header is not one of a tar file.
        OSError: what `read` raises.
    """
    images: list[tuple[str, str]] = []  # sample, member
    places: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for name, offset, size in _members(read):
        folder, _, base = name.rpartition("/")
        if not base or base.startswith("."):
            continue
        stem, _, extension = base.partition(".")
        sample = f"{folder}/{stem}"
        extension = extension.lower().rpartition(".")[2]
        if extension == "cls":
            text = read(offset, min(size, 32)).strip()
            if text.isdigit() and len(text) < 19:
                labels[sample] = int(text)
        elif extension not in SIDE_FILES:
            images.append((sample, name))
            places.append((offset, size))
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return TarIndex(
        StringTable([name for _, name in images]),
        np.ascontiguousarray(table[:, 0]),
        np.ascontiguousarray(table[:, 1]),
        np.array([labels.get(sample, -1) for sample, _ in images], dtype=np.int64),
    )


def _members(read: Reader):
    """(name, offset, size) of each regular member, up to the end, a cut or damage."""
    position = 0
    long_name: str | None = None
    everywhere: dict[str, str] = {}  # pax records of all members that follow
    own: dict[str, str] = {}  # pax records of the next member
    while True:
        header = read(position, BLOCK)
        if position and (len(header) < BLOCK or not header.strip(b"\0")):
            return
        size = _size(header)
        if size is None:
            if position:
                return
            if len(header) == BLOCK and not header.strip(b"\0"):
                return  # an archive of no members
            raise NotATar("it is not an uncompressed tar file")
        kind, position = header[156:157], position + BLOCK
        if kind in b"LKxgX":
            text = read(position, size) if size <= LONG_NAME else b""
            if len(text) < size:
                return
            position += -(-size // BLOCK) * BLOCK
            if kind == b"L":
                long_name = _text(text)
            elif kind in b"xX":
                own = _records(text)
            elif kind == b"g":
                everywhere |= _records(text)
            continue
        records = everywhere | own
        sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in records)
        if kind == b"S":  # the map of an old GNU sparse file may go on in more blocks
            more = header[482]
            while more:
                block = read(position, BLOCK)
                if len(block) < BLOCK:
                    return
                more, position = block[504], position + BLOCK
        name = _text(header[:100])
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
            name = f"{prefix}/{name}"
        name = long_name or records.get("path", name)
        if "size" in own:
            if not own["size"].isdecimal() or len(own["size"]) > 18:
                return
            size = int(own["size"])
        if kind in _REGULAR and not sparse and not folder:
            yield name, position, size
        if kind not in _WITHOUT_DATA and not folder:
            position += -(-size // BLOCK) * BLOCK
        long_name, own = None, {}


def _size(header: bytes) -> int | None:
    """The size that a header states; None for bytes that are no header."""
    if len(header) < BLOCK:
        return None
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
        field = header[124:136]
        if field[0] in (0o200, 0o377):  # base 256, two's complement
            size = int.from_bytes(field[1:], "big") if field[0] == 0o200 else -1
        else:
            size = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None
    rest = header[:148] + header[156:]
    unsigned = 256 + sum(rest)
    if stated != unsigned:  # some old writers summed signed characters
        signed = unsigned - 256 * sum(byte > 127 for byte in rest)
        if stated != signed:
            return None
    return size if 0 <= size < _LARGEST else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """The pax records `<length> <key>=<value>\\n` of a header, up to the first that is damaged.

    Values are UTF-8, or raw bytes where `hdrcharset=BINARY` says so; both come out alike here.
    """
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        digits, space, _ = data[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            break
        record = data[position + len(digits) + 1 : position + int(digits)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or position + int(digits) > len(data):
            break
        text = value[:-1].decode("utf-8", "surrogateescape")
        records[key.decode("utf-8", "surrogateescape")] = text
        position += int(digits)
    if records.get("path"):
        records["path"] = records["path"].rstrip("/")
    return records


# ------------------------------------------------------------------------------ saved indexes


def dump(index: TarIndex, size: int, version: str) -> bytes:
    """The saved form of the index of a shard of `size` bytes, of that version."""
    names = [index.names[i].encode("utf-8", "surrogateescape") for i in range(len(index))]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    header = json.dumps({"images": len(index), "size": size, "version": version}).encode()
    columns = (index.offsets, index.sizes, index.labels, ends)
    body = len(header).to_bytes(4, "little") + header
    body += b"".join(column.astype("<i8").tobytes() for column in columns) + b"".join(names)
    return MAGIC + hashlib.sha256(body).digest() + body


def parse(data: bytes, size: int, version: str | None) -> TarIndex | None:
    """An index from its saved form; None where it is damaged, or of another shard.

    Args:
        data: the saved form.
        size: bytes of the shard.
        version: of the shard; None takes any.
    """
    if not data.startswith(MAGIC) or len(data) < _LEFT_END:
        return None
    digest, body = data[len(MAGIC) : len(MAGIC) + 32], memoryview(data)[len(MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        length = int.from_bytes(body[:4], "little")
        header = json.loads(bytes(body[4 : 4 + length]))
        count, rest = header["images"], body[4 + length :]
        if header["size"] != size or (version is not None and header["version"] != version):
            return None
        table = np.frombuffer(rest, "<i8", 4 * count).reshape(4, count).astype(np.int64)
        offsets, sizes, labels, ends = table
        text = bytes(rest[table.nbytes :])
    except (ValueError, KeyError, TypeError):
        return None
    starts = np.concatenate([[0], ends[:-1]]) if count else ends
    if (ends < starts).any() or (ends[-1] if count else 0) != len(text):
        return None
    places = table[:2]
    if (places < 0).any() or (places > _LARGEST).any() or (labels < -1).any():
        return None
    names = [
        text[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, ends, strict=True)
    ]
    return TarIndex(StringTable(names), offsets, sizes, labels)


def save(path: Path, data: bytes) -> None:
    """Write a saved index, under its name when it is whole. OSError where that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def place(folder: Path, address: str, size: int, version: str) -> Path:
    """Where a folder of indexes keeps that of a shard of this address, size and version."""
    key = hashlib.sha256(json.dumps([address, size, version]).encode()).hexdigest()
    return folder / key[:2] / f"{key[2:34]}.index"


def beside(shard: Path) -> Path:
    """Where the index of a shard lies beside it."""
    return shard.with_name(shard.name + ".index")


def read_beside(shard: Path, status: os.stat_result) -> TarIndex | None:
    """The index beside a local shard, if there is one that fits it."""
    path = beside(shard)
    try:
        if path.stat().st_mtime_ns < status.st_mtime_ns:
            return None
        return parse(path.read_bytes(), status.st_size, None)
    except OSError:
        return None


def write_index(shard: str | os.PathLike[str], beside_it: Path | None = None) -> Path:
    """Index a local shard and save that beside it, as `<shard>.index`; returns where.

    A writer of shards calls it before it renames a finished shard into place, so that a reader
    finds both: `beside_it` is then the final name of the shard.

    Raises:
        OSError: the shard cannot be read or is not a tar file, or the folder cannot be written.
    """
    shard = Path(shard)
    index, status = scan_file(shard)
    path = beside(beside_it or shard)
    save(path, dump(index, status.st_size, ""))
    return path


def scan_file(shard: Path) -> tuple[TarIndex, os.stat_result]:
    """Index a local shard by its headers; also its status.

    Raises:
        OSError: it cannot be read, or (`NotATar`) is not a tar file.
    """
    file = os.open(shard, os.O_RDONLY)
    try:
        return scan(lambda offset, size: os.pread(file, size, offset)), os.fstat(file)
    finally:
        os.close(file)
