"""Real stores on the loopback for the tests: an S3 endpoint (moto's server), and an HTTP server
that serves ranges and has faults. Everything that is started is stopped."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Server(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        log: (path, Range header or "") of every request, in order.
        sent: bytes of bodies sent, by path.
        faults: by path, what happens to the next requests of that path, one each; see `Handler`.
        ranges: whether Range is understood.
        tag: the ETag of all files.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.log: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}
        self.faults: dict[str, list[Callable[[Handler, bytes], None]]] = {}
        self.always: Callable[[Handler, bytes], None] | None = None
        self.ranges = True
        self.tag = '"one"'
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:  # a client that hung up is no news
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
        pass

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        asked = self.headers.get("Range", "")
        with self.server.lock:
            self.server.log.append((self.path, asked))
            waiting = self.server.faults.get(path)
            fault = waiting.pop(0) if waiting else self.server.always
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            self.head(404, 0)
            return
        data = file.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match and self.server.ranges and int(match[1]) >= len(data):
            self.head(416, 0, Content_Range=f"bytes */{len(data)}")
            return
        if match and self.server.ranges:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            self.extra = {"Content_Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            self.status, body = 206, data[begin:end]
        else:
            self.extra, self.status, body = {}, 200, data
        if fault is not None:
            fault(self, body)
            return
        plain(self, body)

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.server.tag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, data: bytes) -> None:
        path = self.path.split("?", 1)[0]
        with self.server.lock:
            self.server.sent[path] = self.server.sent.get(path, 0) + len(data)
        self.wfile.write(data)
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def plain(handler: Handler, body: bytes) -> None:
    """No fault."""
    handler.head(handler.status, len(body), **handler.extra)
    handler.body(body)


def status(code: int, **headers: str) -> Callable[[Handler, bytes], None]:
    """That status, and an empty body."""
    return lambda handler, body: handler.head(code, 0, **headers)


def cut(after: int) -> Callable[[Handler, bytes], None]:
    """The connection ends after so many bytes of the body."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.head(handler.status, len(body), **handler.extra)
        handler.body(body[:after])
        handler.hang_up()

    return fault


def drip(pause: float = 0.05) -> Callable[[Handler, bytes], None]:
    """One byte after the other, without end for anybody who waits."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.head(handler.status, len(body), **handler.extra)
        with contextlib.suppress(OSError):
            for i in range(len(body)):
                handler.body(body[i : i + 1])
                time.sleep(pause)

    return fault


def shorter(handler: Handler, body: bytes) -> None:
    """A range of half the length that was asked for, as if that was all right."""
    half = body[: len(body) // 2]
    handler.head(handler.status, len(half), **handler.extra)
    handler.body(half)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of a folder; the test is skipped where nothing could read from it."""
    pytest.importorskip("aiohttp", reason="needs uv sync --extra remote")
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Bucket:
    """A bucket of moto's S3 server; `put` and `delete` need no client library."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self._ask("PUT", "")

    def put(self, key: str, data: bytes) -> str:
        self._ask("PUT", key, data)
        return f"s3://{self.name}/{key}"

    def delete(self, key: str) -> None:
        self._ask("DELETE", key)

    def _ask(self, method: str, key: str, data: bytes | None = None) -> None:
        url = f"{self.endpoint}/{self.name}/{key}"
        request = urllib.request.Request(url, data=data, method=method)
        request.add_header("Content-Type", "application/octet-stream")
        request.add_header(
            "Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Moto's server in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        environment = os.environ | S3_ENVIRONMENT
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"moto's server did not start: {log.read_text()}") from None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
