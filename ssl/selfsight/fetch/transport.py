"""One HTTP request, under all limits: no redirect followed, no address trusted.

A body is read piece by piece and dropped as soon as it is too long or plainly not wanted. Nothing
of the environment is used (proxies, netrc), no cookie is kept, and what a URL holds of credentials
is not sent.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import zlib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfsight.fetch.addresses import AddressGuard, ForbiddenAddress
from selfsight.fetch.errors import FetchError, require
from selfsight.fetch.hosts import Hosts
from selfsight.fetch.retry import may_try_again, retry_after
from selfsight.fetch.rules import Rules

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver
    from yarl import URL

MAX_URL = 8192  # characters
WEB_PORTS = (80, 443)
PIECE = 1 << 16  # bytes read at a time
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# What the guard refused for the request under way; connections are tried in tasks of their own,
# which inherit the context, and so share the list.
_refused: ContextVar[list[ForbiddenAddress]] = ContextVar("refused")


@dataclass
class Answer:
    """What came back: `body` is empty unless the status is 200. Header names are in lower case."""

    status: int
    headers: dict[str, list[str]]
    body: bytes
    seconds: float

    def header(self, name: str) -> str | None:
        values = self.headers.get(name)
        return values[0] if values else None


def parse_url(text: str) -> URL:
    """A URL that may be asked for, without its credentials and fragment.

    Raises:
        FetchError: "bad URL": not http or https, no host, too long, or a port of another service.
    """
    from yarl import URL

    if len(text) > MAX_URL:
        raise FetchError("bad URL", f"longer than {MAX_URL} characters")
    try:
        return check_url(URL(text.strip()))
    except (ValueError, TypeError) as error:
        raise FetchError("bad URL", str(error)) from None


def check_url(url: URL) -> URL:
    """The same for a URL that is parsed already."""
    if url.scheme not in ("http", "https"):
        raise FetchError("bad URL", f"scheme {url.scheme!r}: only http and https are fetched")
    if not url.host:
        raise FetchError("bad URL", "no host")
    if len(str(url)) > MAX_URL:
        raise FetchError("bad URL", f"longer than {MAX_URL} characters")
    if url.port is not None and url.port < 1024 and url.port not in WEB_PORTS:
        raise FetchError("bad URL", f"port {url.port} belongs to another service")
    return url.with_user(None).with_fragment(None)


class Transport:
    """Sends requests, with turns at hosts and a limit on how many are in flight.

    Use it as `async with Transport(rules) as transport`. `resolver` replaces the system's.
    """

    def __init__(self, rules: Rules, resolver: AbstractResolver | None = None) -> None:
        require("aiohttp")
        import aiohttp

        self._aiohttp = aiohttp
        self._rules, self._resolver = rules, resolver
        self._guard = AddressGuard(rules.allow_addresses)
        self.hosts = Hosts(rules.at_once_per_host, rules.delay_per_host)
        self._places = asyncio.Semaphore(rules.at_once)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transport:
        aiohttp = self._aiohttp
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the semaphores count
                resolver=self._resolver,
                socket_factory=self._socket,
                ttl_dns_cache=60,
                keepalive_timeout=3,  # long enough from robots.txt to the image behind it
            ),
            headers={
                "User-Agent": self._rules.user_agent(),
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # set by request below
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """A socket for an address that a name has led to, unless it must not be reached."""
        family, kind, protocol, _, place = address
        try:
            self._guard.check(str(place[0]))
        except ForbiddenAddress as error:
            _refused.get([]).append(error)
            raise
        return socket.socket(family, kind, protocol)

    async def get(
        self,
        url: URL,
        max_bytes: int,
        seconds: float,
        wanted: Callable[[bytes], bool] | None = None,
        cut: bool = False,
    ) -> Answer:
        """Ask for `url` once.

        Args:
            max_bytes: limit of the body; more is an error, or is left unread with `cut`.
            seconds: time for all of it, from the moment it is our turn.
            wanted: is shown the first bytes of a body; False stops there.

        Raises:
            FetchError: why there is no answer. Any status is an answer.
        """
        assert self._session is not None and url.host is not None
        async with self.hosts.turn(url.host), self._places:
            refused: list[ForbiddenAddress] = []
            token = _refused.set(refused)
            try:
                return await self._get(url, max_bytes, seconds, wanted, cut)
            except FetchError:
                raise
            except Exception as error:  # servers can make the client library raise almost anything
                raise self._explain(error, refused) from None
            finally:
                _refused.reset(token)

    async def _get(
        self,
        url: URL,
        max_bytes: int,
        seconds: float,
        wanted: Callable[[bytes], bool] | None,
        cut: bool,
    ) -> Answer:
        assert self._session is not None
        clock = asyncio.get_running_loop().time
        start = clock()
        first = min(seconds, self._rules.first_byte_seconds)
        async with asyncio.timeout(seconds) as whole:
            try:
                async with asyncio.timeout(first):
                    response = await self._session.get(url, allow_redirects=False)
            except TimeoutError:
                if whole.expired():
                    raise
                raise FetchError("timeout", f"no answer within {first:g} s", again=True) from None
            try:
                headers: dict[str, list[str]] = {}
                for name, value in response.headers.items():
                    headers.setdefault(name.lower(), []).append(value)
                body = b""
                if response.status == 200:
                    body = await _body(response, max_bytes, wanted, cut)
            finally:
                response.close() if not response.content.at_eof() else response.release()
        answer = Answer(response.status, headers, body, clock() - start)
        if may_try_again(answer.status):
            pause = retry_after(answer.header("retry-after")) or 0.0
            self.hosts.pause(str(url.host), min(pause, self._rules.max_wait))
        return answer

    def _explain(self, error: Exception, refused: list[ForbiddenAddress]) -> FetchError:
        aiohttp = self._aiohttp
        if refused:
            return FetchError(refused[0].reason, refused[0].detail)
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            again = getattr(error.os_error, "errno", None) == socket.EAI_AGAIN
            return FetchError("no such host", _short(error.os_error), again=again)
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
            return FetchError("TLS", _short(error))
        if isinstance(error, TimeoutError):
            return FetchError("timeout", "not complete within the time for one try", again=True)
        if isinstance(error, aiohttp.ClientConnectorError):
            # Out of files or memory is this machine's fault, and passes.
            again = getattr(error.os_error, "errno", None) in _OURS
            return FetchError("no connection", _short(error.os_error), again=again)
        if isinstance(error, aiohttp.InvalidURL | ValueError):
            return FetchError("bad URL", _short(error))
        if isinstance(error, aiohttp.ClientResponseError):
            return FetchError("bad answer", f"not HTTP: {_short(error)}")
        if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError | OSError):
            return FetchError("connection cut", _short(error), again=True)
        return FetchError("bad answer", f"{type(error).__name__}: {_short(error)}")


def _short(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200]


async def _body(
    response: aiohttp.ClientResponse,
    max_bytes: int,
    wanted: Callable[[bytes], bool] | None,
    cut: bool,
) -> bytes:
    declared = response.content_length
    if declared is not None and declared > max_bytes and not cut:
        raise FetchError("too large", f"declares {declared:,} bytes")
    unpack = _unpacker(response.headers.getall("Content-Encoding", []))
    body = bytearray()
    judged = wanted is None
    async for piece in response.content.iter_chunked(PIECE):
        # One byte over the limit is enough to know, however much is packed in the piece.
        body += unpack(piece, max_bytes + 1 - len(body))
        if len(body) > max_bytes:
            if cut:
                return bytes(body[:max_bytes])
            raise FetchError("too large", f"more than {max_bytes:,} bytes")
        if not judged and len(body) >= 64 and wanted is not None:
            judged = True
            if not wanted(bytes(body[:64])):
                break
    return bytes(body)


def _unpacker(encodings: Iterable[str]) -> Callable[[bytes, int], bytes]:
    """A function that turns (packed bytes, most bytes wanted) into content.

    Nothing packed is asked for, but some servers always pack. Only as much is unpacked as is
    wanted, so a small body that unpacks to gigabytes costs nothing.
    """
    names = [n.strip().lower() for value in encodings for n in value.split(",")]
    names = [n for n in names if n not in ("", "identity")]
    if not names:
        return lambda piece, most: piece
    if len(names) > 1 or names[0] not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("bad answer", f"content encoding {', '.join(names)[:60]} is not supported")
    unpacking = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # a gzip or zlib header

    def unpack(piece: bytes, most: int) -> bytes:
        try:
            return unpacking.decompress(piece, most)
        except zlib.error as error:
            raise FetchError("bad answer", f"damaged content encoding: {error}") from None

    return unpack
