"""A real HTTP server on loopback that can do everything wrong, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import io
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    count: int
    """How often this path was asked for, this time included."""


Page = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """What a running server has seen. `pages` may be changed while it runs."""

    host: str
    port: int = 0
    pages: dict[str, Page] = field(default_factory=dict)
    fallback: Page | None = None
    requests: list[Request] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    connections: int = 0
    received: int = 0
    now: int = 0
    most_at_once: int = 0

    def url(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{path}"

    def paths(self) -> list[str]:
        return [r.path for r in self.requests]


@contextmanager
def serve(
    pages: dict[str, Page] | None = None,
    fallback: Page | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Iterator[Server]:
    """Run a server in a thread of its own until the block ends. OSError if it cannot bind."""
    server = Server(host, port, dict(pages or {}), fallback)
    counts: Counter[str] = Counter()
    loop = asyncio.new_event_loop()
    open_tasks: set[asyncio.Task[None]] = set()
    open_writers: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.add(writer)
        server.connections += 1
        server.now += 1
        server.most_at_once = max(server.most_at_once, server.now)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                server.received += len(head)
                first, *lines = head.decode("latin-1").split("\r\n")
                path = first.split(" ")[1]
                counts[path] += 1
                pairs = (line.split(":", 1) for line in lines if line)
                headers = {k.strip().lower(): v.strip() for k, v in pairs}
                request = Request(path, headers, counts[path])
                server.requests.append(request)
                server.times.append(loop.time())
                page = server.pages.get(path, server.fallback) or reply(404)
                await page(request, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, Close):
            pass
        finally:
            server.now -= 1
            writer.close()
            if not writer.transport.get_write_buffer_size():
                open_writers.discard(writer)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        open_tasks.add(task)
        task.add_done_callback(open_tasks.discard)

    listening = loop.run_until_complete(asyncio.start_server(accept, host, port))
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        listening.close()
        for writer in open_writers:  # a plain close would wait for what nobody reads
            writer.transport.abort()
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)
        for _ in range(3):  # transports close in the rounds that follow
            await asyncio.sleep(0)

    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class NoNames(AbstractResolver):
    """Knows no name, so that no test asks a name server."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        raise OSError(None, "no names here")

    async def close(self) -> None:
        pass


class Close(Exception):
    """Raised by a page: close the connection now."""


def reply(status: int = 200, body: bytes = b"", **headers: str) -> Page:
    """A whole answer; header names are written with _ for -."""

    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return page


def redirect(to: str, status: int = 302) -> Page:
    return reply(status, Location=to)


def raw(data: bytes, close: bool = True) -> Page:
    """Just these bytes on the wire."""

    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            raise Close

    return page


def times(*pages: Page) -> Page:
    """The first page at the first request, and so on; the last for ever."""

    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        await pages[min(request.count, len(pages)) - 1](request, writer)

    return page


def drip(body: bytes, seconds: float) -> Page:
    """Headers at once, then a byte each `seconds`."""

    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 X\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for n in range(len(body)):
            writer.write(body[n : n + 1])
            await writer.drain()
            await asyncio.sleep(seconds)

    return page


def silent() -> Page:
    """Takes the request and never answers."""

    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    return page


def slow(seconds: float, then: Page) -> Page:
    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await then(request, writer)

    return page


def endless(start: bytes, sent: list[int] | None = None) -> Page:
    """An image that never ends, in chunks; `sent[0]` counts its bytes."""

    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        block = start + bytes(65536 - len(start))
        while True:
            writer.write(b"10000\r\n" + block + b"\r\n")
            await writer.drain()
            if sent is not None:
                sent[0] += len(block)

    return page


def endless_headers() -> Page:
    async def page(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\n")
        while True:
            writer.write(b"X-More: " + b"y" * 1000 + b"\r\n")
            await writer.drain()

    return page


def jpeg(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    """A small picture; different seeds differ."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def bomb(start: bytes, megabytes: int) -> bytes:
    """gzip of an image's first bytes and then that many megabytes of zeros."""
    return gzip.compress(start + bytes(megabytes << 20))


async def numbered(request: Request, writer: asyncio.StreamWriter) -> None:
    """/17.jpg is picture 17; other paths are not there."""
    stem = request.path.strip("/").removesuffix(".jpg")
    found = reply(200, jpeg(int(stem))) if stem.isdigit() else reply(404)
    await found(request, writer)
