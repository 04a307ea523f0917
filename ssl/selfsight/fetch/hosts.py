"""Turns at hosts: how many requests at a time, how far apart, and pauses that a host asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Host:
    def __init__(self, at_once: int, delay: float) -> None:
        self.places = asyncio.Semaphore(at_once)
        self.delay = delay
        self.next_start = 0.0  # clock of the event loop
        self.users = 0


class Hosts:
    """Hands out turns, host by host. A host is forgotten when nobody waits for it any more."""

    def __init__(self, at_once: int, delay: float) -> None:
        self._at_once, self._delay = at_once, delay
        self._hosts: dict[str, _Host] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn at the host, and hold it within the block."""
        host = self._get(name)
        host.users += 1
        try:
            async with host.places:
                clock = asyncio.get_running_loop().time
                while (wait := host.next_start - clock()) > 0:
                    await asyncio.sleep(wait)
                host.next_start = clock() + host.delay
                yield
        finally:
            host.users -= 1
            self._forget()

    def pause(self, name: str, seconds: float) -> None:
        """Start no request at the host for so long."""
        host = self._get(name)
        start = asyncio.get_running_loop().time() + seconds
        host.next_start = max(host.next_start, start)

    def slow_down(self, name: str, delay: float) -> None:
        """Keep at least so many seconds between requests from now on."""
        host = self._get(name)
        if delay > host.delay:
            host.delay = delay
            host.next_start = max(host.next_start, asyncio.get_running_loop().time() + delay)

    def _get(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(self._at_once, self._delay)
        return self._hosts[name]

    def _forget(self) -> None:
        """Drop idle hosts, once there are many, whose pauses are over."""
        if len(self._hosts) < 10_000:
            return
        now = asyncio.get_running_loop().time()
        idle = [n for n, h in self._hosts.items() if not h.users and h.next_start <= now]
        # A delay asked for by robots.txt goes with the host; it is kept while that is cached.
        for name in idle:
            if self._hosts[name].delay <= self._delay:
                del self._hosts[name]
