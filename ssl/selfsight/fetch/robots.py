"""robots.txt (RFC 9309): asked for once a site, kept for a day.

The file counts as "all allowed" where the site answers 4xx (but 429), as "nothing allowed" where it
fails (5xx, no answer), and then is asked for again after ten minutes. Crawl-delay, which the RFC
does not know, is kept too, as far as the longest wait allows.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfsight.fetch.errors import FetchError, require
from selfsight.fetch.retry import check_status, repeat
from selfsight.fetch.rules import AGENT, Rules
from selfsight.fetch.transport import Transport, check_url

if TYPE_CHECKING:
    from yarl import URL

MAX_BYTES = 512 * 1024  # RFC 9309, 2.5: at least 500 KiB are parsed, more may be left out
MAX_REDIRECTS = 5  # RFC 9309, 2.3.1.2
MAX_SITES = 20_000  # kept in memory
KEEP, KEEP_FAILURE = 24 * 3600.0, 600.0  # seconds

_AGENT_LINE = re.compile(r"\s*user[- ]?agent\s*:\s*([^#]*)", re.IGNORECASE)


@dataclass
class _Site:
    rules: Any  # a parsed file, or None: all is allowed
    error: FetchError | None
    until: float


class Robots:
    """Whether a URL may be asked for. `close` it with the transport."""

    def __init__(self, transport: Transport, rules: Rules) -> None:
        require("protego")
        import protego

        self._parse = protego.Protego.parse
        self._transport, self._rules = transport, rules
        self._sites: OrderedDict[URL, asyncio.Task[_Site]] = OrderedDict()

    async def check(self, url: URL) -> None:
        """Raise FetchError where the site does not allow `url`, or cannot be asked."""
        site = await self._site(url.origin())
        if site.error is not None:
            error = site.error
            detail = f"robots.txt: {error.detail}".removesuffix(": ")
            raise FetchError(error.reason, detail if error.reason != "robots.txt" else error.detail)
        if site.rules is not None and not site.rules.can_fetch(str(url), AGENT):
            raise FetchError("robots.txt", "the site does not allow it")

    async def close(self) -> None:
        tasks = [task for task in self._sites.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _site(self, origin: URL) -> _Site:
        now = asyncio.get_running_loop().time()
        task = self._sites.get(origin)
        if task is None or (task.done() and (task.cancelled() or task.result().until < now)):
            task = asyncio.create_task(self._load(origin))
            self._sites[origin] = task
            while len(self._sites) > MAX_SITES:
                oldest = next(iter(self._sites))
                if not self._sites[oldest].done():
                    break
                del self._sites[oldest]
        self._sites.move_to_end(origin)
        # Shielded: others wait for the same file.
        return await asyncio.shield(task)

    async def _load(self, origin: URL) -> _Site:
        clock = asyncio.get_running_loop().time
        try:
            text = await repeat(lambda: self._download(origin), self._rules)
        except FetchError as error:
            return _Site(None, error, clock() + KEEP_FAILURE)
        if text is None:
            return _Site(None, None, clock() + KEEP)
        try:
            parsed = self._parse(only_ours(text))
            delay = parsed.crawl_delay(AGENT)
        except Exception as error:  # the file is a stranger's, and must not end the job
            failure = FetchError("robots.txt", f"cannot be parsed ({type(error).__name__})")
            return _Site(None, failure, clock() + KEEP)
        if delay:
            self._transport.hosts.slow_down(str(origin.host), min(delay, self._rules.max_wait))
        return _Site(parsed, None, clock() + KEEP)

    async def _download(self, origin: URL) -> str | None:
        """The text of the file, or None where there is none."""
        url = origin.with_path("/robots.txt")
        left = self._rules.max_seconds
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._transport.get(url, MAX_BYTES, max(left, 0.1), cut=True)
            left -= answer.seconds
            location = answer.header("location")
            if answer.status in (301, 302, 303, 307, 308) and location:
                try:
                    url = check_url(url.join(type(url)(location)))
                except ValueError:
                    return None
                continue
            if 400 <= answer.status < 500 and answer.status != 429:
                return None
            check_status(answer.status, answer.header("retry-after"))
            return answer.body.decode("utf-8-sig", "replace")
        return None  # RFC 9309, 2.3.1.2: may be taken as unavailable, so all is allowed


def only_ours(text: str) -> str:
    """The file with all agents that are not us under one name.

    A file with thousands of agents and thousands of rules would cost their product to parse.
    """

    def line(text: str) -> str:
        match = _AGENT_LINE.match(text)
        if match is None:
            return text
        name = match.group(1).strip().lower()
        ours = name == "*" or (bool(name.strip("*")) and name.strip("*") in AGENT)
        return f"User-agent: {name if ours else 'somebody-else'}"

    return "\n".join(line(part) for part in text.splitlines())
