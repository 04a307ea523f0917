"""No byte, and no connection, to an address that is not public: on no spelling, hop or resolver."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from selfsight.fetch.addresses import AddressGuard, ForbiddenAddress
from selfsight.fetch.download import Downloader
from selfsight.fetch.errors import FetchError
from selfsight.fetch.rules import Rules
from tests.fetch.servers import jpeg, redirect, reply, serve

# Spellings of such addresses; the client library may already refuse to take them for a host.
OTHERWISE = [
    "2130706434", "0x7f000002", "0177.0.0.2", "0x7f.2", "127.2", "2852039166", "0xa9fea9fe",
    "0251.0376.0251.0376", "169.254.43518", "127。0。0。2", "１０.0.0.1", "127.0.0.2.",
]  # fmt: skip
# Hosts as they stand in a URL: every special range, and those.
FORBIDDEN = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200",
    "100.127.255.255", "127.0.0.2", "127.255.255.254", "169.254.0.1", "169.254.169.254",
    "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.7",
    "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "168.63.129.16",
    *OTHERWISE,
    # IPv6
    "[::]", "[::1]", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "[::ffff:a9fe:a9fe]",
    "[::127.0.0.2]", "[64:ff9b::7f00:2]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a00:1]",
    "[2002:7f00:2::1]", "[2002:c0a8:101::]", "[2001:0:7f00:2::1]", "[2001:db8::1]", "[fe80::1]",
    "[fec0::1]", "[fc00::1]", "[fd00:ec2::254]", "[fd12:3456::1]", "[ff02::1]", "[3fff::1]",
    "[100::1]", "[5f00::1]",
]  # fmt: skip
NAMES = {
    "metadata.google.internal": "169.254.169.254",
    "router.test": "192.168.1.1",
    "self.test": "127.0.0.2",
    "six.test": "::1",
    "mapped.test": "::ffff:10.0.0.1",
}
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "169.253.1.1"]
PUBLIC += ["192.0.1.1", "223.255.255.255", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"]
PUBLIC += ["::ffff:8.8.8.8"]

_seen: list[tuple[str, Any]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        _seen.append((event, arguments[1]))


sys.addaudithook(_listen)  # cannot be taken out again; it does nothing outside `watched`


@contextmanager
def watched() -> Iterator[list[tuple[str, Any]]]:
    """Every address that this process connects or sends to, as the interpreter reports it."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


class Resolver(AbstractResolver):
    """Answers from a table; an entry that is a list gives its addresses in turn."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked += 1
        entry = self.names[host]
        if isinstance(entry, list):
            entry = entry.pop(0) if len(entry) > 1 else entry[0]
        answers = []
        for address in entry if isinstance(entry, tuple) else (entry,):
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            answers.append(
                ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)
            )
        return answers

    async def close(self) -> None:
        pass


def rules(**values: Any) -> Rules:
    return Rules(**{"max_seconds": 5.0, "retries": 0, "robots": False, **values})


async def outcome(downloader: Downloader, url: str) -> str:
    try:
        return (await downloader.get(url)).extension
    except FetchError as error:
        return error.reason


def outcomes(urls: list[str], fetch_rules: Rules, resolver: Any = None) -> list[str]:
    async def all_of_them() -> list[str]:
        async with Downloader(fetch_rules, resolver) as downloader:
            return [await outcome(downloader, url) for url in urls]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("robots", [False, True])
def test_forbidden_addresses_get_no_connection(robots):
    urls = [f"http://{host}:8080/a.jpg" for host in FORBIDDEN]
    urls += [f"https://{host}/a.jpg" for host in FORBIDDEN]
    assert len(FORBIDDEN) >= 40
    with watched() as seen:
        found = outcomes(urls, rules(robots=robots))
    reasons = dict(zip(urls, found, strict=True))
    odd = {u for u in urls if reasons[u] == "bad URL"}
    assert all(any(f"/{host}" in u for host in OTHERWISE) for u in odd)
    assert {reasons[u] for u in urls if u not in odd} == {"forbidden address"}
    assert seen == []


def test_names_of_forbidden_addresses_get_no_connection():
    with watched() as seen:
        found = outcomes([f"http://{n}/" for n in NAMES], rules(), Resolver(dict(NAMES)))
    assert found == ["forbidden address"] * len(NAMES)
    assert seen == []


def test_redirects_to_forbidden_addresses_are_not_followed():
    """The first hop is allowed; real listeners wait at the second where one can be bound."""
    with ExitStack() as stack:
        server = stack.enter_context(serve())
        victims = []
        for host in ("127.0.0.2", "127.255.255.254", "::1"):
            try:
                victims.append(
                    stack.enter_context(
                        serve(fallback=reply(200, jpeg()), host=host, port=server.port)
                    )
                )
            except OSError:  # no such address on this system
                continue
        assert victims
        for n, host in enumerate(FORBIDDEN):
            server.pages[f"/{n}"] = redirect(f"http://{host}:{server.port}/secret", 301 + n % 2)
        urls = [server.url(f"/{n}") for n in range(len(FORBIDDEN))]
        with watched() as seen:
            found = outcomes(urls, rules(allow_addresses=("127.0.0.1",)))
        reasons = dict(zip(FORBIDDEN, found, strict=True))
        odd = {host for host in FORBIDDEN if reasons[host] == "bad URL"}
        assert odd <= set(OTHERWISE)
        assert {reasons[host] for host in FORBIDDEN if host not in odd} == {"forbidden address"}
        assert {address[0] for _, address in seen} <= {"127.0.0.1"}
        assert [(v.connections, v.received) for v in victims] == [(0, 0)] * len(victims)
        # the listeners do listen: allowed, they are reached
        assert outcomes([victims[0].url("/")], rules(allow_addresses=("::1", "127.0.0.0/8"))) == [
            "jpg"
        ]
        assert victims[0].received > 0


def test_a_resolver_that_changes_its_answer_gains_nothing():
    """DNS rebinding: allowed at the first look-up, forbidden at the second."""
    with serve(fallback=reply(200, jpeg(), Connection="close")) as server:
        try:
            victim_server = serve(fallback=reply(200, jpeg()), host="127.0.0.2", port=server.port)
            victim = victim_server.__enter__()
        except OSError:
            pytest.skip("127.0.0.2 cannot be bound here")
        try:
            resolver = Resolver({"rebind.test": ["127.0.0.1", "127.0.0.2"]})
            resolver.names["both.test"] = ("127.0.0.2", "127.0.0.1")

            async def run() -> list[str]:
                allowed = rules(allow_addresses=("127.0.0.1/32",))
                async with Downloader(allowed, resolver) as downloader:
                    url = f"http://rebind.test:{server.port}/a"
                    first = await outcome(downloader, url)
                    session = downloader._transport._session
                    assert session is not None
                    session.connector.clear_dns_cache()  # type: ignore[union-attr]
                    second = await outcome(downloader, url)
                    both = await outcome(downloader, f"http://both.test:{server.port}/a")
                    return [first, second, both]

            with watched() as seen:
                found = asyncio.run(run())
            assert found[:2] == ["jpg", "forbidden address"]
            assert found[2] in ("jpg", "forbidden address")
            assert resolver.asked == 3
            assert {address[0] for _, address in seen} == {"127.0.0.1"}
            assert (victim.connections, victim.received) == (0, 0)
        finally:
            victim_server.__exit__(None, None, None)


def test_robots_txt_cannot_lead_to_a_forbidden_address():
    pages = {"/robots.txt": redirect("http://169.254.169.254/latest/"), "/a": reply(200, jpeg())}
    with serve(pages) as server, watched() as seen:
        found = outcomes([server.url("/a")], rules(robots=True, allow_addresses=("127.0.0.1",)))
    assert found == ["forbidden address"]
    assert server.paths() == ["/robots.txt"]
    assert {address[0] for _, address in seen} == {"127.0.0.1"}


def test_public_addresses_pass_and_allowed_networks_too():
    guard = AddressGuard()
    for address in PUBLIC:
        guard.check(address)
    allowing = AddressGuard(["10.2.0.0/16", "fd00::/8", "127.0.0.1"])
    for address in ("10.2.3.4", "fd00:ec2::254", "127.0.0.1", "::ffff:10.2.3.4"):
        allowing.check(address)
        with pytest.raises(ForbiddenAddress):
            guard.check(address)
    for address in ("10.3.0.1", "127.0.0.2", "::1", "::ffff:10.3.0.1", "fe80::1%eth0", "nonsense"):
        with pytest.raises(ForbiddenAddress):
            allowing.check(address)


def test_a_network_that_is_none_is_a_sentence():
    with pytest.raises(ValueError, match=r"allow_addresses has '10\.0\.0\.0/99'.*192\.168"):
        Rules(allow_addresses=("10.0.0.0/99",))
