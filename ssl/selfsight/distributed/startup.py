"""Before the first step: all ranks are there, and run the same thing.

`meet` names the ranks that did not come, `check_ranks` the one that came with another
configuration, another version of the code, or other packages.
"""

from __future__ import annotations

import hashlib
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from selfsight.distributed import collectives

if TYPE_CHECKING:
    from selfsight.distributed.env import World

PACKAGES = ("torch", "torchvision", "numpy")
LINGER = 2.0  # seconds that rank 0 keeps the store, for others to see who is missing
_SHOWN = 8
_KEY = "selfsight/joined"


class RanksDiffer(ValueError):
    """The ranks of a job do not run the same thing; one sentence that names which."""


class Store(Protocol):
    """As torch's stores are."""

    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


def meet(store: Store, rank: int, size: int, timeout: float) -> None:
    """Wait until every rank has come to the store, before anything that only waits.

    Raises:
        ConnectionError: some did not come in `timeout` seconds; it names them.
    """
    store.set(f"{_KEY}/{rank}", socket.gethostname())
    keys = {r: f"{_KEY}/{r}" for r in range(size)}
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout))
        return
    except RuntimeError as error:  # torch's time-outs and lost connections derive from it
        try:
            missing = [r for r, key in keys.items() if not store.check([key])]
            hosts = {r: store.get(keys[r]).decode() for r in range(size) if r not in missing}
        except RuntimeError:
            raise ConnectionError(
                "rank 0, which serves the store that ranks meet at, has gone: look at its log"
            ) from error
    if not missing:
        return  # it came at the last moment
    if rank == 0:
        time.sleep(LINGER)
    there = Counter(hosts.values())
    came = ", ".join(f"{n} on {host}" for host, n in list(there.items())[:_SHOWN])
    raise ConnectionError(
        f"{_ranks(missing)} of {size} did not come in {timeout:.0f} s; there are {came}: look at "
        "the log of the ranks that did not come"
    )


def check_ranks(
    world: World,
    config_hash: str,
    code: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Refuse to start where a rank differs from the others. A collective.

    Args:
        world: this rank's place.
        config_hash: of the resolved configuration.
        code: of the package's source; None: `code_version()`.
        versions: of what results depend on; None: `package_versions()`.

    Raises:
        RanksDiffer: on every rank, with the same sentence.
    """
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "world size": str(world.size),
        "ranks on its node": str(world.local_size),
        "kind of device": world.device.type,
        "configuration": config_hash[:12],
        "code": (code or code_version())[:12],
        **{f"version of {k}": v for k, v in (versions or package_versions()).items()},
    }
    every = collectives.all_gather_json([world.rank, own])
    if wrong := [n for n, (rank, _) in enumerate(every) if rank != n]:
        raise RanksDiffer(f"rank {wrong[0]} of the process group thinks it is {every[wrong[0]][0]}")
    ranks = [facts for _, facts in every]
    for key in own:
        if key == "host":
            continue
        counts = Counter(facts.get(key) for facts in ranks)
        if len(counts) == 1:
            continue
        usual, times = counts.most_common(1)[0]
        if 2 * times == len(ranks):  # no majority: rank 0 is the measure
            usual = ranks[0].get(key)
        odd = [n for n, facts in enumerate(ranks) if facts.get(key) != usual]
        first = ranks[odd[0]]
        raise RanksDiffer(
            f"{_ranks(odd)} (on {first['host']}) differ{'s' if len(odd) == 1 else ''} from the "
            f"others in {key}: {first.get(key)} there and {usual} elsewhere; start all ranks with "
            "the same command, code and environment"
        )


@cache
def code_version() -> str:
    """SHA-256 over names and bytes of the package's Python files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the bits of a result."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
