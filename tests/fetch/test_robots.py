"""robots.txt: obeyed for each site, asked for once, and judged as RFC 9309 says where it fails."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from selfsight.fetch import robots
from selfsight.fetch.download import Downloader
from selfsight.fetch.errors import FetchError
from selfsight.fetch.rules import Rules
from tests.fetch import servers
from tests.fetch.servers import Page, jpeg, raw, redirect, reply, serve

OK = reply(200, jpeg(1))


def reasons(paths: list[str], page: Page, **values: Any) -> tuple[list[str], list[str]]:
    """What each path gives ("jpg" or a reason) under a robots.txt, and the paths asked for."""
    base = {"max_seconds": 20.0, "first_byte_seconds": 10.0, "retries": 0}
    rules = Rules(**{**base, "allow_addresses": ("127.0.0.0/8",), **values})
    with serve({"/robots.txt": page}, fallback=OK) as server:

        async def one(downloader: Downloader, path: str) -> str:
            try:
                return (await downloader.get(server.url(path))).extension
            except FetchError as error:
                return error.reason

        async def run() -> list[str]:
            async with Downloader(rules) as downloader:
                return list(await asyncio.gather(*(one(downloader, path) for path in paths)))

        return asyncio.run(run()), server.paths()


def text(content: str) -> Page:
    return reply(200, content.encode(), Content_Type="text/plain")


def test_disallowed_paths_are_not_asked_for_and_the_file_once():
    page = text("User-agent: *\nDisallow: /private/\nDisallow: /*.gif$\nAllow: /private/open\n")
    paths = ["/a.jpg", "/private/b", "/private/open/c", "/x/y.gif", "/x/y.gif?1", "/robots.jpg"]
    found, asked = reasons(paths, page)
    assert found == ["jpg", "robots.txt", "jpg", "robots.txt", "jpg", "jpg"]
    assert asked.count("/robots.txt") == 1
    assert not {"/private/b", "/x/y.gif"} & set(asked)


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        ("", True),
        ("<html>no such page</html>", True),
        ("User-agent: *\nDisallow:\n", True),
        ("User-agent: *\nDisallow: /\n", False),
        ("user-agent:*\ndisallow:/ # all\n", False),
        ("\ufeffUser-agent: *\r\nDisallow: /\r\n", False),
        ("User-agent: googlebot\nDisallow: /\n", True),
        ("User-agent: SelfSight\nDisallow: /\n\nUser-agent: *\nDisallow:\n", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: selfsight\nAllow: /\n", True),
        ("User-agent: otherbot\nUser-agent: selfsight\nDisallow: /a\n", False),
        ("User-agent: otherbot\nDisallow: /\n\nUser-agent: thirdbot\nDisallow: /\n", True),
    ],
)
def test_groups(content, allowed):
    found, _ = reasons(["/a"], text(content))
    assert found == ["jpg" if allowed else "robots.txt"]


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (reply(404), "jpg"),
        (reply(403), "jpg"),
        (reply(410), "jpg"),
        (reply(429), "status 429"),
        (reply(500), "status 500"),
        (reply(503), "status 503"),
        (raw(b""), "connection cut"),
        (servers.silent(), "timeout"),
        (redirect("/robots.txt"), "jpg"),  # without end: as if there were none
        (redirect("/rules"), "robots.txt"),
    ],
)
def test_a_file_that_cannot_be_had(page, found):
    wait = 0.5 if found == "timeout" else 10.0
    rules = Rules(allow_addresses=("127.0.0.1",), retries=0, first_byte_seconds=wait)
    pages = {"/robots.txt": page, "/rules": text("User-agent: *\nDisallow: /\n"), "/a": OK}
    with serve(pages) as server:

        async def run() -> str:
            async with Downloader(rules) as downloader:
                try:
                    return (await downloader.get(server.url("/a"))).extension
                except FetchError as error:
                    return error.reason

        assert asyncio.run(run()) == found
        assert ("/a" in server.paths()) == (found == "jpg")


def test_every_hop_asks_its_own_site():
    with serve({"/robots.txt": text("User-agent: *\nDisallow: /closed\n")}, fallback=OK) as second:
        rules = Rules(allow_addresses=("127.0.0.1",), retries=0)
        with serve({"/a": redirect(second.url("/closed/b"))}) as first:

            async def run() -> None:
                async with Downloader(rules) as downloader:
                    await downloader.get(first.url("/a"))

            with pytest.raises(FetchError, match=r"robots\.txt"):
                asyncio.run(run())
            assert first.paths() == ["/robots.txt", "/a"]
            assert second.paths() == ["/robots.txt"]


def test_switched_off_it_is_not_asked_for():
    found, asked = reasons(["/a"], text("User-agent: *\nDisallow: /\n"), robots=False)
    assert found == ["jpg"] and asked == ["/a"]


def test_crawl_delay_is_kept_up_to_the_longest_wait():
    start = time.monotonic()
    page = text("User-agent: *\nCrawl-delay: 100000\n")
    found, _ = reasons(["/a", "/b", "/c"], page, max_wait=0.3)
    assert found == ["jpg"] * 3
    assert time.monotonic() - start > 0.85


def test_random_files_end_in_an_answer():
    dice = random.Random(11)
    words = ["User-agent", ":", "*", "selfsight", "Disallow", "/", "$", "%", "%zz", "\n", "Allow",
             "Crawl-delay", "-1", "1e999", "\x00", "é", "[", "//[::1", "#", "request-rate", "1/0",
             "visit-time", "9999-0000", "\r"]  # fmt: skip
    for _ in range(40):
        content = "".join(dice.choice(words) for _ in range(dice.randrange(200)))
        found, _ = reasons(["/a?b=[1]%zz"], text(content), max_wait=0.0)
        assert found[0] in ("jpg", "robots.txt")


def test_a_huge_file_is_read_to_the_limit_and_parsed_in_time():
    """Thousands of agents times thousands of rules; and the rules behind the limit do not count."""
    agents = "".join(f"User-agent: bot{n}\n" for n in range(8000))
    rules = "".join(f"Disallow: /*a*{n}\n" for n in range(8000))
    content = "User-agent: *\nDisallow: /a\n" + agents + rules
    content += "# " + "x" * (robots.MAX_BYTES - len(content)) + "\nUser-agent: *\nDisallow: /\n"
    start = time.monotonic()
    found, _ = reasons(["/a", "/b"], text(content))
    assert found == ["robots.txt", "jpg"]
    assert time.monotonic() - start < 10
