"""The settings of a fetching job, checked strictly: a mistake is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from selfsight.fetch.rules import Rules
from selfsight.signatures import signature


@dataclass
class Settings:
    """What `launch/fetch.py` is told about the job; conf/fetch.yaml says what each key does.

    `rules` has the keys about how URLs are fetched.
    """

    urls: str | list[str] | None = None
    out: str | None = None
    url_column: str | None = None
    keep_columns: list[str] = field(default_factory=list)
    shard_size: int = 10_000
    drop_repeated_images: bool = False
    max_unreachable: int | None = 1000
    progress: bool = True
    rules: Rules = field(default_factory=Rules)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings of these values.

    Raises:
        ValueError: one sentence that names the key, and the nearest known one.
    """
    job = signature("selfsight.fetch.settings.Settings")
    rules = signature("selfsight.fetch.rules.Rules")
    assert job is not None and rules is not None
    known = [name for name in (*job.names, *rules.names) if name != "rules"]
    own: dict[str, Any] = {}
    manners: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it knows {', '.join(known)}."
            raise ValueError(f"there is no key '{key}': {hint}")
        found, chosen = (rules, manners) if key in rules.names else (job, own)
        if (wanted := found.refuses(str(key), value)) is not None:
            raise ValueError(f"{key}={value!r} must be {wanted}.")
        chosen[key] = tuple(value) if isinstance(value, list) and chosen is manners else value
    settings = Settings(**own)
    if not settings.urls:
        raise ValueError("a list of URLs is needed: set urls=/path/to/list.parquet.")
    if not settings.out:
        raise ValueError("a folder for the shards is needed: set out=/path/to/folder.")
    if settings.shard_size < 1:
        raise ValueError(f"shard_size={settings.shard_size} must be at least 1.")
    if settings.max_unreachable is not None and settings.max_unreachable < 1:
        raise ValueError(f"max_unreachable={settings.max_unreachable} must be at least 1, or null.")
    settings.rules = Rules(**manners)
    unknown = [d for d in settings.rules.opt_out if d != d.lower() or not d.isidentifier()]
    if unknown:
        raise ValueError(f"opt_out has {unknown[0]!r}: it lists directives such as noai, noindex.")
    return settings
