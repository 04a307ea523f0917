"""How a run differs from the recipe it chose."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfsight.build import compose
from selfsight.config import ConfigError, flat

# Where and how it runs, not what is learnt.
ASIDE = (
    "name", "runs_dir", "device", "cluster.", "tracking.", "checkpoint.", "timeouts.", "recovery.",
    "loader.", "resume", "data.", "overrides", "gpus", "eval.",
)  # fmt: skip
# What follows from other keys: the trunk and head stand in `model` too.
FOLLOWING = ("method.trunk.", "method.head.", "model.trunk_parameters", "schedule.lr.")


@dataclass(frozen=True)
class Change:
    """One value that differs."""

    key: str
    recipe: Any
    run: Any


def choices(config: DictConfig) -> list[str]:
    """The choices of groups (`model=...`, `recipe=...`) of a run's command line."""
    given = config.get("overrides") or []
    return [text for text in given if "." not in text.split("=")[0] and not text.startswith("~")]


def changes(config: DictConfig) -> list[Change] | None:
    """The values that differ from what the run's choices of groups alone would give; None where the
    command line is not known or composes no more."""
    given = config.get("overrides")
    if given is None:
        return None
    groups = [text for text in choices(config) if _is_group(text.split("=")[0].lstrip("+"))]
    try:
        recipe = flat(compose("pretrain", groups))
    except (ConfigError, OmegaConfBaseException, ValueError):
        return None
    run = flat(config)
    return [
        Change(key, recipe.get(key), run.get(key))
        for key in sorted({**recipe, **run})
        if recipe.get(key) != run.get(key) and not key.startswith(ASIDE + FOLLOWING)
    ]


def _is_group(name: str) -> bool:
    return name in ("model", "method", "optim", "schedule", "recipe", "data", "eval", "tracking")


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
