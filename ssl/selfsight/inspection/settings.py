"""What `launch/inspect_data.py` can be told beside what a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfsight.config import ConfigError


@dataclass(frozen=True)
class Inspect:
    """The section `inspect`; conf/inspect_data.yaml says what each key does."""

    samples: int = 1000
    seconds: float = 60.0
    out: str | None = None
    loader_seconds: float = 10.0
    images_per_second: float | None = None
    pictures: int = 48
    crops: int = 12


def settings_from(values: Mapping[str, Any]) -> Inspect:
    """The settings of these values, whose names and types `config.check` has checked.

    Raises:
        ConfigError: one sentence that names the key.
    """
    settings = Inspect(**values)
    for name, least in (("samples", 1), ("pictures", 0), ("crops", 0), ("loader_seconds", 0)):
        if getattr(settings, name) < least:
            raise ConfigError(f"inspect.{name}={getattr(settings, name)} must be at least {least}")
    for name in ("seconds", "images_per_second"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"inspect.{name}={value} must be above 0")
    return settings
