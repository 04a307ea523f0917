"""Trying again: after what, when, and how often."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from selfsight.fetch.errors import FetchError
from selfsight.fetch.rules import Rules

FIRST_WAIT = 1.0  # seconds; doubled by each try

T = TypeVar("T")


def check_status(status: int, asked: str | None) -> None:
    """Raise FetchError unless the status is 200; 429 and 5xx may be tried again.

    `asked` is the answer's Retry-After.
    """
    if status == 200:
        return
    again = may_try_again(status)
    raise FetchError(f"status {status}", again=again, wait=retry_after(asked) if again else None)


def may_try_again(status: int) -> bool:
    """Whether the status speaks of now rather than of this URL."""
    return status == 429 or (500 <= status < 600 and status not in (501, 505))


def retry_after(text: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header (a number or a date, RFC 9110, 10.2.3), or None."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


async def repeat(once: Callable[[], Awaitable[T]], rules: Rules) -> T:
    """Await `once()`, again where its error allows it. Where a server asks to wait for longer than
    `rules.max_wait`, the URL is given up.

    Raises:
        FetchError: the last one.
    """
    for attempt in range(rules.retries + 1):
        try:
            return await once()
        except FetchError as error:
            if not error.again or attempt == rules.retries:
                raise
            if error.wait is not None and error.wait > rules.max_wait:
                raise FetchError(
                    error.reason, f"asks to wait {error.wait:.0f} s, more than max_wait"
                ) from None
            # Drawn anew each time, so that URLs that failed together do not return together.
            backoff = FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(max(backoff, error.wait or 0.0), rules.max_wait))
    raise AssertionError("unreachable")
