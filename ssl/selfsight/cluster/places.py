"""Where this process stands in a world that somebody else has made: torchrun, Kubernetes, srun."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from selfsight.config import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank and world, and the address where ranks meet, as `distributed.env.join` takes them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    meet: str


def made_by_a_launcher(environ: Mapping[str, str]) -> bool:
    """Whether a launcher such as torchrun says that this is a rank of its world."""
    return all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def made_by_srun(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that `srun` started."""
    return "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def from_environment(environ: Mapping[str, str]) -> Place:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT say.

    Without the local ones each process is alone on its machine, as Kubernetes' pods are.

    Raises:
        ConfigError: one is missing, or is not a number that makes sense.
    """
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"cluster=env joins a world that torchrun or another launcher has made, and "
            f"{', '.join(missing)} is not set: start it with torchrun, or set cluster=local"
        )
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE", least=1)
    local_rank = _number(environ, "LOCAL_RANK", default=0)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", default=1, least=1)
    _number(environ, "MASTER_PORT", least=1)
    if "LOCAL_WORLD_SIZE" not in environ and local_rank:
        raise ConfigError("LOCAL_RANK is set and LOCAL_WORLD_SIZE is not: set both, or neither")
    for what, place, of in (("RANK", rank, size), ("LOCAL_RANK", local_rank, local_size)):
        if place >= of:
            raise ConfigError(f"{what}={place} does not exist among {of}: they count from 0")
    if size % local_size:
        raise ConfigError(
            f"WORLD_SIZE={size} does not consist of machines with LOCAL_WORLD_SIZE={local_size}"
        )
    # env:// and not tcp://: torchrun may serve the store itself
    return Place(rank, size, local_rank, local_size, "env://")


def from_slurm(environ: Mapping[str, str], meet: str | None = None) -> Place:
    """The place of one process of an `srun`; by default the ranks meet on the first node.

    Raises:
        ConfigError: this is no such process, or nodes have different numbers of processes.
    """
    if "SLURM_PROCID" not in environ:
        raise ConfigError("this is not a process that srun started")
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS", least=1)
    local_rank = _number(environ, "SLURM_LOCALID")
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    if not (match := re.fullmatch(r"(\d+)(\(x\d+\))?", counts)):
        raise ConfigError(
            f"nodes have different numbers of processes ({counts}): give each node the same"
        )
    local_size = int(match.group(1))
    if meet is None:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        host = "127.0.0.1" if size == local_size else first_node(nodes)
        job = int(environ.get("SLURM_JOB_ID", "0")) * 17 + _number(environ, "SLURM_STEP_ID")
        meet = f"tcp://{host}:{15_000 + job % 15_000}"
    return Place(rank, size, local_rank, local_size, meet)


def first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu[003-010,12],big1` -> `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"the list of nodes {nodes!r} cannot be read")
    return "".join(part or "" for part in match.groups())


def _number(
    environ: Mapping[str, str], name: str, default: int | None = None, least: int = 0
) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise ConfigError(f"{name}={text!r} must be a whole number, at least {least}")
    return int(text)
