"""One HTTP request for a file or a part of it, over the session of fsspec's HTTP file system.

fsspec by itself does not notice a server that ignores ranges before it has read the whole body, and
it hands over nothing of an answer that is cut.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

CHUNK = 1 << 18  # bytes handed on at a time
CONNECT, SILENCE = 30.0, 60.0  # seconds, at most, for a connection and between two pieces


class NoRanges(OSError):
    """The store hands out whole files only."""


class Refused(OSError):
    """An answer that another try will not change."""


class Busy(OSError):
    """An answer that another try may change, perhaps after so many seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Stat:
    """Bytes of a file; a text that differs when it is replaced; whether parts of it can be read."""

    size: int
    version: str
    ranges: bool = True


def request(
    system: Any,
    address: str,
    begin: int,
    end: int | None,
    version: str | None,
    take: Callable[[bytes], None] | None,
    left: float,
) -> Stat:
    """Ask for bytes `begin` to `end` (None: for all) of a file, and give what comes to `take`.

    Args:
        system: fsspec's HTTP file system.
        address: of the file.
        begin: first byte.
        end: the byte after the last, or None for the whole file.
        version: what the file must be, or None.
        take: called with the body in pieces; None: only the head is wanted.
        left: seconds until the head must be there.

    Raises:
        FileNotFoundError, Refused, NoRanges: another try will not help. Other exceptions: it may.
    """
    import aiohttp
    from fsspec.asyn import sync

    headers = {"Accept-Encoding": "identity"}
    if end is not None:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    left = max(left, 0.05)
    waits = aiohttp.ClientTimeout(
        total=None, sock_connect=min(left, CONNECT), sock_read=min(left, SILENCE)
    )

    async def ask() -> Stat:
        session = await system.set_session()
        async with asyncio.timeout(left):  # a head that drips in, too
            answer = await session.get(system.encode_url(address), headers=headers, timeout=waits)
        async with answer:
            stat = _judged(answer, begin, end)
            if version and stat.version and stat.version != version:
                raise Refused("it was replaced while it was read")
            if take is not None:
                if not stat.ranges and end is not None:
                    raise NoRanges("the server hands out whole files only")
                async for chunk in answer.content.iter_chunked(CHUNK):
                    take(chunk)
            return stat

    result: Any = sync(system.loop, ask)
    return result


def _judged(answer: Any, begin: int, end: int | None) -> Stat:
    """What the head of an HTTP answer says of a file, or the error that it is."""
    status, headers = answer.status, answer.headers
    if status in (404, 410):
        raise FileNotFoundError
    if status in (408, 425, 429) or status >= 500:
        raise Busy(f"HTTP status {status}", _pause(headers.get("Retry-After", "")))
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    stated = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
    if status == 206 and stated and stated[1] is not None and int(stated[1]) == begin:
        return Stat(int(stated[2]), version)
    if status == 416 and stated and begin == 0 and int(stated[2]) == 0:
        return Stat(0, version)
    if status != 200:
        raise Refused(f"HTTP status {status}")
    if answer.content_length is None and end is not None:
        raise Refused("the server does not state its length")
    return Stat(answer.content_length or 0, version, ranges=False)


def _pause(text: str) -> float:
    """Seconds of a Retry-After header, 0 where it says nothing."""
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
