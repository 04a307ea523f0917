"""One rank from joining the world to leaving it: the same for SLURM, torchrun and this machine."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfsight.cluster import packages
from selfsight.cluster.devices import choose_device
from selfsight.cluster.places import Place
from selfsight.config import ConfigError, divisors_text
from selfsight.distributed import collectives, env

Job = Callable[[DictConfig, str, env.World], dict[str, Any]]


def find(function: str) -> Job:
    """The function that `selfsight.a.b.name` names.

    Raises:
        ConfigError: there is none, or it is not this package's.
    """
    module, _, name = function.rpartition(".")
    if not module.startswith("selfsight."):
        raise ConfigError(f"{function} is not a function of selfsight")
    return getattr(importlib.import_module(module), name)


def run(place: Place, config: DictConfig, name: str, function: str | Job) -> dict[str, Any]:
    """Join the world at `place`, run the job, leave. Returns rank 0's summary on rank 0, and its
    status on all.

    Raises:
        ValueError: what was asked for cannot be done here; one sentence.
        ConnectionError: the ranks did not meet.
    """
    if config.batch_size % place.size:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide over {place.size} processes; "
            f"{divisors_text(config.batch_size, place.size)}"
        )
    if place.rank == 0:
        anyway = "anyway" in (config.cluster.environment, config.resume)
        packages.hold_run(Path(config.runs_dir).expanduser() / name, anyway)
    job = find(function) if isinstance(function, str) else function
    world = env.join(
        place.rank,
        place.size,
        local_rank=place.local_rank,
        local_size=place.local_size,
        address=place.meet,
        device=choose_device(config.device),
        timeout=config.cluster.timeout_minutes * 60,
    )
    summary = dict(job(config, name, world) or {})
    status = collectives.broadcast_json(summary.get("status"))
    collectives.barrier()  # rank 0 keeps the store that the others may still need
    env.leave()
    return summary | ({"status": status} if status else {})
