"""The settings of a fetching job, checked strictly: a mistake is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from selfsight.fetch.rules import OPT_OUT, Rules
from selfsight.signatures import signature


@dataclass
class Settings:
    """Everything `launch/fetch.py` can be told; conf/fetch.yaml says what each key does.

    The keys that `Rules` has are handed to it by `rules`.
    """

    urls: str | list[str] | None = None
    out: str | None = None
    url_column: str | None = None
    keep_columns: list[str] = field(default_factory=list)
    shard_size: int = 10_000
    drop_repeated_images: bool = False
    max_unreachable: int | None = 1000
    progress: bool = True
    max_bytes: int = 20_000_000
    max_seconds: float = 60.0
    first_byte_seconds: float = 20.0
    max_redirects: int = 5
    retries: int = 2
    max_wait: float = 60.0
    at_once: int = 128
    at_once_per_host: int = 4
    delay_per_host: float = 0.0
    allow_addresses: list[str] = field(default_factory=list)
    robots: bool = True
    opt_out: list[str] = field(default_factory=lambda: list(OPT_OUT))
    tdm_reservation: bool = True
    contact: str | None = None

    def rules(self) -> Rules:
        """ValueError where a value makes no sense."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Rules)}
        for name in ("allow_addresses", "opt_out"):
            values[name] = tuple(values[name])
        return Rules(**values)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings of these values.

    Raises:
        ValueError: one sentence that names the key, and the nearest known one.
    """
    found = signature("selfsight.fetch.settings.Settings")
    assert found is not None
    for key, value in values.items():
        if key not in found.names:
            near = get_close_matches(str(key), found.names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it knows {', '.join(found.names)}."
            raise ValueError(f"there is no key '{key}': {hint}")
        if (wanted := found.refuses(str(key), value)) is not None:
            raise ValueError(f"{key}={value!r} must be {wanted}.")
    settings = Settings(**dict(values))
    if not settings.urls:
        raise ValueError("a list of URLs is needed: set urls=/path/to/list.parquet.")
    if not settings.out:
        raise ValueError("a folder for the shards is needed: set out=/path/to/folder.")
    if settings.shard_size < 1:
        raise ValueError(f"shard_size={settings.shard_size} must be at least 1.")
    if settings.max_unreachable is not None and settings.max_unreachable < 1:
        raise ValueError(f"max_unreachable={settings.max_unreachable} must be at least 1, or null.")
    unknown = [d for d in settings.opt_out if d != d.lower() or not d.isidentifier()]
    if unknown:
        raise ValueError(f"opt_out has {unknown[0]!r}: it lists directives such as noai, noindex.")
    settings.rules()
    return settings
