"""Which shards are meant: braces, globs, folders and list files, on local disks and elsewhere.

A name is one of these, or a list of them: `train-{000000..000012}.tar`, `{train,val}-000000.tar`, a
glob, a folder (its `*.tar`), or a text file ending in `.txt` or `.list` with one of these a line,
relative to itself. All may be remote; globs and folders only where the store can be listed.

Every shard gets a short name, its address below the root: the longest folder that the fixed parts
of all patterns share (the fixed part of a pattern ends at its last folder before a brace or a
wildcard; a list file stands for its lines). It does not depend on where the set is mounted. Within
a run it stays: the root is that of the start, and a resume finds it again from the recorded names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from selfsight.data.sources.source import Gone
from selfsight.data.sources.storage import Storage, is_remote, public

MOST = 10_000_000  # names that braces may stand for
DEEPEST = 8  # list files in list files
_LISTS = (".txt", ".list")
_BRACE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass
class Listing:
    """What a pattern stands for.

    Attributes:
        addresses: of the shards, in order, each once.
        root: the address of a folder, with a slash at its end, or "" where the shards share none.
    """

    addresses: list[str] = field(default_factory=list)
    root: str = ""

    def name(self, address: str) -> str:
        """The short name of a shard: below the root, or all of its address elsewhere."""
        return short(address, self.root)


def short(address: str, root: str) -> str:
    return public(address).removeprefix(root)


def full(name: str, root: str) -> str:
    """The address of a short name, without what was secret in it."""
    return name if is_remote(name) or name.startswith("/") else root + name


def expand(asked: Sequence[str], storage: Storage) -> Listing:
    """All shards that a list of patterns names. They are not looked at one by one.

    Raises:
        ValueError: a command (`pipe:`), no such file, nothing found, or a store that cannot be
            listed; one sentence.
    """
    found = _Found(storage)
    for item in asked:
        before = len(found.addresses)
        found.add(item, "", 0)
        _check(list(islice(found.addresses, before, None)))
    if not found.addresses:
        raise ValueError(f"the list of shards {', '.join(map(public, asked))} is empty.")
    first, last = min(found.folders), max(found.folders)
    shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    root = first[:shared] if shared is not None else min(first, last, key=len)
    return Listing(list(found.addresses), root[: root.rfind("/") + 1])


def title(item: str) -> str:
    """A short name for the set that a pattern stands for: its last fixed folder, or list file."""
    address = public(item)
    if address.endswith(_LISTS):
        return re.split(r"[/\\]", address)[-1].rpartition(".")[0]
    folder = _fixed(_absolute(address, ""))
    if not is_remote(address) and not _has_magic(address) and os.path.isdir(address):  # noqa: PTH112
        folder = _absolute(address, "") + "/"
    return folder.rstrip("/").rpartition("/")[2] or "shards"


class _Found:
    def __init__(self, storage: Storage) -> None:
        self.addresses: dict[str, None] = {}
        self.folders: set[str] = set()
        self._storage = storage

    def add(self, item: str, folder: str, depth: int) -> None:
        """Add the shards of one pattern; a relative one lies in `folder`."""
        if any(part.startswith("pipe:") for part in item.split("::")):
            raise ValueError(
                f"{public(item)} would run a command, which is not supported: name tar files."
            )
        fixed = _fixed(_absolute(item, folder))
        for name in expand_braces(item):
            address = _absolute(name, folder)
            if _is_tar(address) and not _has_magic(address):
                self.addresses[address] = None
                self.folders.add(fixed)
            else:
                self._add_other(address, fixed, depth)

    def _add_other(self, address: str, fixed: str, depth: int) -> None:
        """A list file, a folder, a glob, or a file of another name."""
        remote = is_remote(address)
        here = None if remote else os.path.exists(address)  # noqa: PTH110
        if public(address).endswith(_LISTS) and (remote or here) and not _has_magic(address):
            self._add_list(address, depth)
            return
        if here and not os.path.isdir(address):  # noqa: PTH112
            self.addresses[address] = None
            self.folders.add(fixed)
            return
        http = address.startswith(("http://", "https://"))
        if http and not _has_magic(address) and not address.endswith("/"):
            self.addresses[address] = None
            self.folders.add(fixed)
            return
        folder = not _has_magic(address) or here
        pattern = address.rstrip("/") + "/*.tar" if folder else address
        try:
            matches = self._storage.glob(pattern if not here else _escaped(address) + "/*.tar")
        except OSError as error:
            raise ValueError(
                f"the shards of {public(address)} cannot be listed: {error}."
            ) from None
        matches = [m for m in matches if remote or not os.path.isdir(m)]  # noqa: PTH112
        if not matches:
            raise _missing(address)
        self.folders.add(address.rstrip("/") + "/" if folder else fixed)
        for match in matches:
            if match.endswith(_LISTS):
                self._add_list(match, depth)
            else:
                self.addresses[match] = None

    def _add_list(self, address: str, depth: int) -> None:
        if depth == DEEPEST:
            raise ValueError(f"the list {public(address)} is in itself, or {depth} lists deep.")
        try:
            text = self._storage.whole(address).decode("utf-8", "surrogateescape")
        except Gone:
            raise _missing(address) from None
        except OSError as error:
            raise ValueError(f"the list of shards cannot be read: {error}.") from None
        folder = address.split("?", 1)[0].rpartition("/")[0] + "/"
        for line in text.splitlines():
            line = line.strip()
            if line and not line.startswith("#"):
                self.add(line, folder, depth + 1)


def _check(addresses: list[str]) -> None:
    """ValueError where none of some local shards is there: all would take minutes on a network."""
    some = addresses[:: 1 + len(addresses) // 16]
    if some and not any(is_remote(a) or os.path.exists(a) for a in some):  # noqa: PTH110
        raise _missing(some[0])


def _missing(address: str) -> ValueError:
    return ValueError(f"no shard is found at {public(address)}: check the path of the shards.")


def _absolute(item: str, folder: str) -> str:
    """The address of an item that lies in `folder` ("": the working folder) if it is relative."""
    if item.startswith("file://"):
        item = item.removeprefix("file://")
    if is_remote(item):
        return item
    if is_remote(folder) and not item.startswith("/"):
        return folder + item
    if item.startswith("~"):
        item = os.path.expanduser(item)  # noqa: PTH111
    path = os.path.join(folder, item)  # noqa: PTH118
    if not path.startswith("/") or "/." in path or "//" in path:
        path = os.path.abspath(path)  # noqa: PTH100
    return path.rstrip("/") or "/"


def _fixed(address: str) -> str:
    """The folder of a pattern, up to its first brace or wildcard, with a slash at its end."""
    address = public(address)
    scheme, separator, rest = address.rpartition("://")
    rest = re.split(r"[*?\[{]", rest, maxsplit=1)[0]
    return scheme + separator + rest[: rest.rfind("/") + 1]


def _is_tar(address: str) -> bool:
    return address.endswith(".tar") or public(address).endswith(".tar")


def _has_magic(address: str) -> bool:
    """Whether it is a glob; in a web address only stars count, `?` begins its query."""
    if address.startswith(("http://", "https://")):
        return "*" in public(address)
    return any(letter in address for letter in "*?[")


def _escaped(path: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", path.rstrip("/"))


def expand_braces(text: str) -> list[str]:
    """Expand `{000..012}` (keeping leading zeros) and `{a,b}`, the leftmost outermost.

    Raises:
        ValueError: they stand for more names than anybody can mean.
    """
    match = _BRACE.search(text)
    if not match:
        return [text]
    first, last, words = match.groups()
    rests = expand_braces(text[match.end() :])
    if words is not None:
        inner: Sequence[str] = words.split(",")
    else:
        count = abs(int(first) - int(last)) + 1
        if count * len(rests) > MOST:
            raise ValueError(
                f"{public(text)} stands for more than {MOST} shards: check its braces."
            )
        step = 1 if int(first) <= int(last) else -1
        digits = len(first) if first.startswith("0") or last.startswith("0") else 0
        inner = [f"{n:0{digits}d}" for n in range(int(first), int(last) + step, step)]
    head = text[: match.start()]
    return [head + word + rest for word in inner for rest in rests]
