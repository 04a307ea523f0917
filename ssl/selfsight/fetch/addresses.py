"""Addresses that must not be connected to: everything that is not the public internet.

A URL list is written by strangers, and names may resolve to anything: to services of this machine,
of its network, or of its cloud (whose metadata address hands out credentials). So the numeric
address is judged, at the moment a socket is made for it, whatever the name, its spelling, a
redirect or a resolver that changes its answers has led there.

IPv4: the special-purpose registry of IANA (RFC 6890 and later), and addresses that clouds use for
themselves within public space. IPv6: only 2000::/3 is public; of it the registry's special blocks
are refused, and so are 6to4 (RFC 3056) and Teredo (RFC 4380), tunnels that carry an IPv4 address.
IPv4-mapped addresses (RFC 4291) and the NAT64 prefix 64:ff9b::/96 (RFC 6052) are judged by the IPv4
address that they hold.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from selfsight.fetch.errors import FetchError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _networks(*pairs: tuple[str, str]) -> list[tuple[Network, str]]:
    return [(ipaddress.ip_network(network), word) for network, word in pairs]


FORBIDDEN_4 = _networks(
    ("0.0.0.0/8", "unspecified"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "carrier-grade NAT"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local, where clouds keep metadata"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "documentation"),
    ("192.88.99.0/24", "6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "benchmarking"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("168.63.129.16/32", "cloud metadata"),  # Azure's platform service lies in public space
)
FORBIDDEN_6 = _networks(
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("fc00::/7", "private"),
    ("ff00::/8", "multicast"),
    ("64:ff9b:1::/48", "local NAT64"),
    ("2001::/32", "Teredo tunnel"),
    ("2001::/23", "reserved"),
    ("2001:db8::/32", "documentation"),
    ("2002::/16", "6to4 tunnel"),
    ("3fff::/20", "documentation"),
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class ForbiddenAddress(FetchError):
    """A connection that was not made."""

    def __init__(self, address: str, kind: str) -> None:
        super().__init__("forbidden address", f"{address} ({kind})")


class AddressGuard:
    """Tells public addresses from all others, which only `allow` (networks) admits.

    Raises:
        ValueError: an entry of `allow` is not an address or network.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._allow: list[Network] = []
        for text in allow:
            try:
                self._allow.append(ipaddress.ip_network(str(text)))
            except ValueError:
                raise ValueError(
                    f"allow_addresses has {text!r}, which is not a network: write 192.168.0.0/16 "
                    "or a single address such as 10.1.2.3."
                ) from None

    def check(self, host: str) -> None:
        """Raise ForbiddenAddress unless `host`, a numeric address of a socket, may be reached."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])  # without an IPv6 zone
        except ValueError:
            raise ForbiddenAddress(host, "not a numeric address") from None
        inner = _inside(address)
        kind = _kind(inner)
        if kind is None or self._allowed(inner) or self._allowed(address):
            return
        raise ForbiddenAddress(host, kind if inner == address else f"{kind}, as {inner}")

    def _allowed(self, address: Address) -> bool:
        return any(address.version == n.version and address in n for n in self._allow)


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _kind(address: Address) -> str | None:
    """What makes an address not public, or None."""
    table = FORBIDDEN_4 if address.version == 4 else FORBIDDEN_6
    for network, word in table:
        if address in network:
            return word
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_6:
        return "reserved"
    return None
