"""Limits and manners of fetching: one object that all parts read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from selfsight.fetch.addresses import AddressGuard
from selfsight.fetch.errors import require

AGENT = "selfsight"  # the name that robots.txt and X-Robots-Tag know this fetcher by
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex")


@dataclass(frozen=True)
class Rules:
    """How URLs are fetched.

    Attributes:
        max_bytes: an image that declares or sends more is refused; also after unpacking.
        max_seconds: time for one try of a URL over all its redirects, without waiting for its turn.
        first_byte_seconds: time until the headers of an answer are there.
        max_redirects: redirects followed for one URL.
        retries: further tries after a timeout, a cut connection, 429 or 5xx.
        max_wait: most seconds between two tries; a server that asks for longer is left alone.
        at_once: requests in flight.
        at_once_per_host: requests in flight at one host.
        delay_per_host: least seconds between the starts of two requests at one host.
        allow_addresses: networks that may be reached though they are not public.
        robots: obey robots.txt (RFC 9309).
        opt_out: directives of X-Robots-Tag that keep an image out.
        tdm_reservation: `tdm-reservation: 1` (W3C TDM Reservation Protocol) keeps an image out.
        contact: address or page in the User-Agent, for those who run the servers.

    Raises:
        ValueError: a value that makes no sense.
    """

    max_bytes: int = 20_000_000
    max_seconds: float = 60.0
    first_byte_seconds: float = 20.0
    max_redirects: int = 5
    retries: int = 2
    max_wait: float = 60.0
    at_once: int = 128
    at_once_per_host: int = 4
    delay_per_host: float = 0.0
    allow_addresses: tuple[str, ...] = ()
    robots: bool = True
    opt_out: tuple[str, ...] = OPT_OUT
    tdm_reservation: bool = True
    contact: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "at_once", "at_once_per_host"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("max_seconds", "first_byte_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0 seconds.")
        for name in ("max_redirects", "retries", "max_wait", "delay_per_host"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.contact is not None and not (self.contact.isascii() and self.contact.isprintable()):
            raise ValueError(
                f"contact={self.contact!r} goes into a header: use plain characters on one line."
            )
        AddressGuard(self.allow_addresses)

    def check_packages(self) -> None:
        """Raise ValueError where a package is missing that these rules need."""
        require("aiohttp")
        if self.robots:
            require("protego")

    def user_agent(self) -> str:
        """The User-Agent header: who asks, and where to complain."""
        try:
            number = version("selfsight")
        except PackageNotFoundError:  # run from a source tree that is not installed
            number = "0"
        return f"{AGENT}/{number}" + (f" (+{self.contact})" if self.contact else "")
