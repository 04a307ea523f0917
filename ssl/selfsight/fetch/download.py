"""A URL to the bytes of an image, over its redirects, with everything checked on every hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfsight.fetch.errors import FetchError
from selfsight.fetch.images import ENOUGH, image_extension
from selfsight.fetch.optout import opted_out
from selfsight.fetch.retry import check_status, repeat
from selfsight.fetch.robots import Robots
from selfsight.fetch.rules import AGENT, Rules
from selfsight.fetch.transport import Answer, Transport, check_url, parse_url

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver
    from yarl import URL

_MOVED = (301, 302, 303, 307, 308)


@dataclass
class Image:
    """A downloaded image.

    Attributes:
        data: the file as it was sent.
        extension: by its first bytes.
        url: where it came from in the end.
    """

    data: bytes
    extension: str
    url: str


class Downloader:
    """Downloads images: `async with Downloader(rules) as downloader: await downloader.get(url)`.

    Many `get` may run at once; they wait for their turns. `resolver` replaces the system's.
    """

    def __init__(self, rules: Rules, resolver: AbstractResolver | None = None) -> None:
        self._rules = rules
        self._transport = Transport(rules, resolver)
        self._robots = Robots(self._transport, rules) if rules.robots else None

    async def __aenter__(self) -> Downloader:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._robots is not None:
            await self._robots.close()
        await self._transport.__aexit__()

    async def get(self, url: str) -> Image:
        """The image at `url`.

        Raises:
            FetchError: why there is none.
        """
        start = parse_url(url)
        try:
            return await repeat(lambda: self._follow(start), self._rules)
        except FetchError:
            raise
        except Exception as error:  # one odd server must not end a long job
            raise FetchError("bad answer", f"{type(error).__name__}: {error}"[:200]) from error

    async def _follow(self, url: URL) -> Image:
        left = self._rules.max_seconds
        for _ in range(self._rules.max_redirects + 1):
            if self._robots is not None:
                await self._robots.check(url)
            if left <= 0:
                raise FetchError("timeout", "spent on redirects", again=True)
            answer = await self._transport.get(url, self._rules.max_bytes, left, _is_image)
            left -= answer.seconds
            location = answer.header("location")
            if answer.status in _MOVED and location:
                self._check_opt_out(answer)
                try:
                    url = check_url(url.join(type(url)(location)))
                except ValueError as error:
                    raise FetchError("bad URL", f"redirect: {error}") from None
                continue
            check_status(answer.status, answer.header("retry-after"))
            self._check_opt_out(answer)
            extension = image_extension(answer.body[:ENOUGH])
            if extension is None:
                raise FetchError("not an image", _describe(answer))
            return Image(answer.body, extension, str(url))
        raise FetchError("redirects", f"more than {self._rules.max_redirects}")

    def _check_opt_out(self, answer: Answer) -> None:
        tdm = answer.header("tdm-reservation") if self._rules.tdm_reservation else None
        tags = answer.headers.get("x-robots-tag", [])
        header = opted_out(tags, tdm, self._rules.opt_out, AGENT)
        if header is not None:
            raise FetchError("opted out", header)


def _is_image(head: bytes) -> bool:
    return image_extension(head) is not None


def _describe(answer: Answer) -> str:
    if not answer.body:
        return "empty"
    return f"sent as {(answer.header('content-type') or 'no type')[:60]}"
