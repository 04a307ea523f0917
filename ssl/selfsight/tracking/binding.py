"""What of a configuration binds a run that goes on, and what may change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.config import flat, flat_tree, published

# What follows from the run's length, which may change, unless it was given by hand.
FOLLOWING = (
    "schedule.warmup_steps", "schedule.lr.warmup_steps",
    "method.teacher_temperature_warmup_steps", "method.freeze_last_layer_steps",
)  # fmt: skip
# What may differ when a run goes on: where and how it runs and reports, and how long.
FREE = (
    "name", "runs_dir", "device", "deterministic", "gpus", "images", "epochs", "steps", "resume",
    "schedule.lr.steps", "schedule.weight_decay.steps",
    *FOLLOWING, "checkpoint.", "loader.workers",
    "loader.prefetch", "loader.max_bad_share", "loader.decode_seconds", "loader.fetch_seconds",
    "loader.growth_gb", "cluster.", "tracking.", "eval.", "data.eval_",
    "recovery.", "timeouts.", "overrides",
    "method.classes",  # counted where it is "auto"
)  # fmt: skip


def config_hash(config: DictConfig) -> str:
    """A hash of what binds."""
    bound = {k: v for k, v in flat(config).items() if not k.startswith(FREE)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def difference(text: str, config: DictConfig) -> tuple[str, Any, Any] | None:
    """The first binding key in which `config` differs from the one written as `text` (yaml), and
    both values as they may be shown. Keys of the model come first."""
    before, now = flat(OmegaConf.create(text)), flat(config)
    free = tuple(key for key in FREE if key not in FOLLOWING or _follows(config, key))
    for key in sorted({**before, **now}, key=lambda key: (not key.startswith("model."), key)):
        if before.get(key) != now.get(key) and not key.startswith(free):
            old = flat_tree(OmegaConf.to_container(OmegaConf.create(text))).get(key)
            return key, old, flat_tree(published(config)).get(key)
    return None


def _follows(config: DictConfig, key: str) -> bool:
    """Whether the value of `key` is computed, or absent, and not given by hand."""
    section, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, section)
    return node is None or leaf not in node or OmegaConf.is_interpolation(node, leaf)
