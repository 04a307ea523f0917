"""Reading files by address: local paths, `https://`, `s3://`, and whatever fsspec opens.

Remote reads are tried again with growing pauses until the time limit is over; a file that is not
there, or may not be read, fails at once. Access is configured as the store's own library does it
(AWS_* variables, `AWS_ENDPOINT_URL`, fsspec's configuration files); names in messages carry neither
user names nor query strings, since these may be secrets.
"""

from __future__ import annotations

import glob
import os
import random
import re
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from selfsight.data.sources import web
from selfsight.data.sources.source import Gone
from selfsight.data.sources.web import Busy, NoRanges, Refused, Stat

WINDOW = 8 << 20  # bytes of one ranged read, and that must arrive within the time limit
LARGEST_LIST = 1 << 30  # bytes of a list file or an index
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 8.0  # seconds between tries


class CannotWrite(OSError):
    """What arrived cannot be written here: a full disk, most often."""


def is_remote(address: str) -> bool:
    return "://" in address


def public(address: str) -> str:
    """An address without user name, password, query and fragment."""
    address = re.sub(r"://[^/@]*@", "://", address)
    return re.split(r"[?#]", address, maxsplit=1)[0] if _is_http(address) else address


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def check(address: str) -> None:
    """ValueError where addresses of that kind cannot be read here. Loads nothing, asks nothing."""
    from fsspec.registry import known_implementations, registry

    scheme = address.split("://", 1)[0]
    if scheme in registry:
        return
    known = known_implementations.get(scheme)
    if known is None:
        reason = f"no store of kind {scheme}:// is known"
        raise ValueError(f"{public(address)} cannot be read: {reason}.")
    package = "aiohttp" if _is_http(address) else known["class"].split(".", 1)[0]
    if find_spec(package) is None:
        reason = _missing(address, f"{package} is not installed")
        raise ValueError(f"{public(address)} cannot be read: {reason}.")


class Storage:
    """Reads files by address. Make one in each process; its methods may be called from any thread.

    Args:
        seconds: a read is given up when its next `window` bytes (or all of it, if fewer) have not
            come after so long, all tries together.
        window: bytes.
    """

    def __init__(self, seconds: float = 120.0, window: int = WINDOW) -> None:
        self.seconds, self.window = seconds, window
        self._lock = threading.Lock()
        self._systems: dict[tuple[str, str], Any] = {}

    def stat(self, address: str) -> Stat:
        """Size and version of a file.

        Raises:
            Gone: there is no such file. OSError: it cannot be reached or may not be read.
        """
        if not is_remote(address):
            status = _local(address, lambda: os.stat(address))  # noqa: PTH116
            return Stat(status.st_size, str(status.st_mtime_ns))

        def once(left: float) -> Stat:
            if _is_http(address):
                return self._http(address, 0, 1, None, None, left)
            system, path = self._system(address)
            info = self._call(system, "info", path, left=left)
            size = info.get("size")
            if info.get("type") == "directory" or size is None:
                raise FileNotFoundError(path)
            tags = (info.get(k) for k in ("ETag", "etag", "mtime", "LastModified", "updated"))
            return Stat(int(size), str(next((t for t in tags if t), "")))

        return self._patiently(address, _Clock(self), once)

    def read(self, address: str, offset: int, size: int, version: str | None = None) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            Gone: there is no such file. NoRanges: the store hands out whole files only. OSError:
            anything else, also that the file has fewer bytes, or is no longer of that version.
        """
        if not size:
            return b""
        if not is_remote(address):
            return _local(address, lambda: _read_local(address, offset, size))
        clock = _Clock(self)
        data = bytearray()

        def take(chunk: bytes) -> None:
            data.extend(chunk)
            clock.arrived(len(chunk))

        def once(left: float) -> bytes:
            begin = offset + len(data)
            if len(data) == size:  # cut after its last byte
                return bytes(data)
            if _is_http(address):
                self._http(address, begin, offset + size, version, take, left)
            else:
                system, path = self._system(address)
                end = offset + size
                take(self._call(system, "cat_file", path, start=begin, end=end, left=left))
            if len(data) != size:
                data.clear()
                raise Busy("another number of bytes came than was asked for")
            return bytes(data)

        return self._patiently(address, clock, once)

    def download(self, address: str, file: int, have: int, stat: Stat) -> None:
        """Complete an open file that holds the first `have` bytes of a remote one.

        Raises:
            CannotWrite: the disk is full. Gone, OSError: as for `read`.
        """
        position = have if stat.ranges else 0
        clock = _Clock(self)

        def take(chunk: bytes) -> None:
            nonlocal position
            rest = memoryview(chunk)
            try:
                while rest:  # a disk that is nearly full takes only a part
                    written = os.pwrite(file, rest, position)
                    position, rest = position + written, rest[written:]
            except OSError as error:
                raise CannotWrite(error.strerror or str(error)) from None
            clock.arrived(len(chunk))

        def once(left: float) -> None:
            nonlocal position
            if position == stat.size and stat.ranges:  # cut after its last byte
                return
            if _is_http(address) and stat.ranges:
                self._http(address, position, stat.size, stat.version, take, left)
            elif _is_http(address):
                position = 0
                self._http(address, 0, None, stat.version, take, left)
            else:
                system, path = self._system(address)
                end = min(position + self.window, stat.size)
                data = self._call(system, "cat_file", path, start=position, end=end, left=left)
                if len(data) != end - position:
                    raise Busy("another number of bytes came than was asked for")
                take(data)

        while position < stat.size:
            self._patiently(address, clock, once)
        if position != stat.size:
            raise OSError(f"{public(address)} gave {position} bytes, not the {stat.size} it stated")

    def whole(self, address: str) -> bytes:
        """All of a small file. Gone or OSError where it cannot be read, or is not small."""
        if not is_remote(address):
            size = self.stat(address).size
            return self.read(address, 0, size)
        clock = _Clock(self)
        data = bytearray()

        def take(chunk: bytes) -> None:
            data.extend(chunk)
            if len(data) > LARGEST_LIST:
                raise Refused(f"it has more than {LARGEST_LIST} bytes")
            clock.arrived(len(chunk))

        def once(left: float) -> bytes:
            data.clear()
            if _is_http(address):
                self._http(address, 0, None, None, take, left)
                return bytes(data)
            system, path = self._system(address)
            return self._call(system, "cat_file", path, left=left)

        return self._patiently(address, clock, once)

    def glob(self, pattern: str) -> list[str]:
        """Addresses of all files that match, sorted; OSError where the store cannot be listed."""
        if not is_remote(pattern):  # glob.glob, since Path.glob takes no absolute pattern
            return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207

        def once(left: float) -> list[str]:
            system, path = self._system(pattern)
            found = self._call(system, "glob", path, left=left)
            bare = path.lstrip("/")
            if not pattern.endswith(bare):
                return sorted(system.unstrip_protocol(name) for name in found)
            # As the pattern is written, so that a shard has one address, however it was listed.
            head = pattern.removesuffix(bare)
            return sorted(head + name.lstrip("/") for name in found)

        return self._patiently(pattern, _Clock(self), once)

    # ------------------------------------------------------------------------------ one try

    def _system(self, address: str) -> tuple[Any, str]:
        """fsspec's file system for an address, and the path in it."""
        scheme, rest = address.split("://", 1)
        key = (scheme, "" if _is_http(address) else rest.split("/", 1)[0])
        with self._lock:
            if key not in self._systems:
                try:
                    import fsspec

                    options: dict[str, Any] = {"use_listings_cache": False}
                    if _is_http(address):  # proxies as the environment says
                        options["client_kwargs"] = {"trust_env": True}
                    self._systems[key], _ = fsspec.url_to_fs(
                        address, skip_instance_cache=True, **options
                    )
                except ImportError as error:
                    raise Refused(_missing(address, _said(error))) from None
                except ValueError as error:
                    raise Refused(_said(error)) from None
            system = self._systems[key]
        return system, system._strip_protocol(address)

    def _call(self, system: Any, method: str, path: str, *, left: float, **options: Any) -> Any:
        """A method of a file system; one of those that can be interrupted, within `left` s."""
        if getattr(system, "async_impl", False):
            from fsspec.asyn import sync

            action = getattr(system, f"_{method}")
            return sync(system.loop, action, path, timeout=max(left, 0.1), **options)
        return getattr(system, method)(path, **options)

    def _http(
        self,
        address: str,
        begin: int,
        end: int | None,
        version: str | None,
        take: Callable[[bytes], None] | None,
        left: float,
    ) -> Stat:
        """One request for bytes begin to end (None: for all of the file), given to `take`."""
        system, _ = self._system(address)
        try:
            return web.request(system, address, begin, end, version, take, left)
        except ImportError as error:
            raise Refused(_missing(address, _said(error))) from None

    def _patiently(self, address: str, clock: _Clock, once: Callable[[float], Any]) -> Any:
        """The result of the first try that succeeds."""
        name = public(address)
        while True:
            try:
                return once(clock.left())
            except FileNotFoundError:
                raise Gone(f"{name} is not there") from None
            except CannotWrite:
                raise
            except NoRanges as error:
                raise NoRanges(
                    f"{name} cannot be read in parts ({error}): set data.cache to a local folder, "
                    "so that whole shards are fetched"
                ) from None
            except (Refused, PermissionError) as error:
                raise OSError(f"{name} cannot be read: {_said(error)}") from None
            except (TypeError, AttributeError, NameError):
                raise
            except Exception as error:  # libraries raise their own kinds, not only OSError
                if type(error).__name__ in _HOPELESS:
                    raise OSError(f"{name} cannot be read: {_said(error)}") from None
                clock.failed(name, error)


_HOPELESS = {"NoCredentialsError", "PartialCredentialsError", "InvalidURL"}


class _Clock:
    """The patience of one read: it starts anew whenever a window's worth of bytes has come."""

    def __init__(self, storage: Storage) -> None:
        self._seconds, self._window = storage.seconds, storage.window
        self._came = self._tries = 0
        self._reason = ""
        self._began = time.monotonic()

    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def arrived(self, count: int) -> None:
        self._came += count
        if self._came >= self._window:
            self._came = self._tries = 0
            self._began = time.monotonic()
        elif self.left() <= 0:
            raise Busy(f"only {self._came} bytes came")

    def failed(self, name: str, error: Exception) -> None:
        """Pause before the next try; OSError when there is no time for one."""
        self._tries += 1
        if not self._reason or not isinstance(error, TimeoutError):
            self._reason = _said(error)  # the last try may just have had too little time
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._tries - 1)) * random.uniform(0.5, 1.0)
        pause = max(pause, getattr(error, "pause", 0.0))
        if pause >= self.left():
            tries = "1 try" if self._tries == 1 else f"{self._tries} tries"
            raise OSError(
                f"{name} could not be read within {self._seconds:g} s ({tries}): {self._reason}"
            ) from None
        time.sleep(pause)


def _said(error: BaseException) -> str:
    """What an error says, in one line and without the secrets that an address may carry."""
    text = " ".join(str(error).split())
    text = re.sub(r"://[^/@\s]*@", "://", re.sub(r"\?[^\s'\")]*", "", text))
    if not text and isinstance(error, TimeoutError):
        return "no answer came in time"
    return text[:200].rstrip(".") or type(error).__name__


def _missing(address: str, reason: str) -> str:
    scheme = address.split("://", 1)[0]
    return f"{scheme}:// needs more packages ({reason}): run uv sync --extra remote"


def _local(address: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except FileNotFoundError:
        raise Gone(f"{address} is not there") from None


def _read_local(address: str, offset: int, size: int) -> bytes:
    file = os.open(address, os.O_RDONLY)
    try:
        data = os.pread(file, size, offset)
    finally:
        os.close(file)
    if len(data) < size:
        raise OSError(f"{address} ends before byte {offset + size}")
    return data
