"""Who this process is among the processes of a run, and how they meet.

A world of one starts no process group: every function of `collectives.py` is then an identity. A
larger world on GPUs gets two backends, NCCL for tensors on the device and gloo for tensors in host
memory, so that small control messages never wait for the device.

Processes on one machine meet over its loopback interface alone, both the store and gloo: torch
listens on every interface otherwise.
"""

import os
import socket
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from selfsight.distributed.startup import meet

LOOPBACK = ("127.0.0.1", "localhost")
_INTERFACE = "GLOO_SOCKET_IFNAME"
_set_by_join: set[str] = set()


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size`, `local_rank` of `local_size` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} does not exist in a world of {self.size}.")
        if not 0 <= self.local_rank < self.local_size:
            raise ValueError(
                f"local rank {self.local_rank} does not exist on a node of {self.local_size} ranks."
            )
        if self.size % self.local_size:
            raise ValueError(
                f"a world of {self.size} ranks does not consist of whole nodes of "
                f"{self.local_size}; start the same number of ranks on each node."
            )

    @property
    def main(self) -> bool:
        """True on the one rank that writes to disk and to the console."""
        return self.rank == 0


def free_port() -> int:
    """A TCP port that is free on the loopback interface now, for ranks started on this machine."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK[0], 0))
        return probe.getsockname()[1]


def join(
    rank: int = 0,
    size: int = 1,
    *,
    local_rank: int = 0,
    local_size: int = 1,
    address: str = "env://",
    device: str | torch.device = "cpu",
    timeout: float = 600.0,
) -> World:
    """Join the world and return this process's place in it.

    Args:
        rank: index of this process, from 0.
        size: number of processes; 1 starts no process group.
        local_rank: index of this process on its node; it picks the GPU.
        local_size: number of processes on each node.
        address: where the ranks meet: `tcp://HOST:PORT` (rank 0 listens there), `file:///PATH` (a
            file that does not exist yet, on a shared folder), or `env://` (MASTER_ADDR and
            MASTER_PORT, as torchrun sets them).
        device: `cpu`, `cuda` (this rank's GPU: the only one, where each process sees one, or number
            `local_rank`), `mps`, or one exact device such as `cuda:1`.
        timeout: seconds until a rank that does not join, or a collective that does not finish, is
            an error.

    Raises:
        ValueError: the place or the device does not exist.
        ConnectionError: the ranks did not meet in time.
    """
    world = World(rank, size, local_rank, local_size, _resolve(torch.device(device), local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        return world
    if world.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device {world.device.type} trains in one process; start one, not {size}."
        )
    assert not dist.is_initialized(), "this process has joined a world already"

    limit = timedelta(seconds=timeout)
    url = urlsplit(address)
    local = size == local_size or url.hostname in LOOPBACK
    if local and not os.environ.get(_INTERFACE):
        os.environ[_INTERFACE] = _loopback_interface()
        _set_by_join.add(_INTERFACE)
    try:
        store = _store(address, world, limit)
        if store is not None:
            meet(store, rank, size, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
            init_method=address if store is None else None,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=world.device if world.device.type == "cuda" else None,
        )
        dist.barrier()
    except ConnectionError as error:
        leave()
        raise ConnectionError(f"{error} ({address})") from None
    except (RuntimeError, ValueError) as error:  # torch's DistError derives from RuntimeError
        leave()
        raise ConnectionError(
            f"rank {rank} did not meet the other ranks of {size} at {address} in {timeout:g} s; "
            f"look at the log of the ranks that did not come ({error})."
        ) from error
    return world


def leave() -> None:
    """End the process group, if there is one. A process may join again afterwards."""
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on shutdown are no news to the user
            dist.destroy_process_group()
    for name in _set_by_join:
        os.environ.pop(name, None)
    _set_by_join.clear()


def _resolve(device: torch.device, local_rank: int) -> torch.device:
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index
        if index is None:
            index = 0 if count == 1 else local_rank
        if index >= count:
            raise ValueError(
                f"GPU {index} was asked for and this process sees {count}; start at most as many "
                f"ranks on a node as it has GPUs, or set device=cpu."
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not available on this machine; set device=cpu.")
    return device


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _store(address: str, world: World, timeout: timedelta) -> Store | None:
    """The store of `tcp://` and `env://` addresses, not yet waited for; None for others."""
    url = urlsplit(address)
    if url.scheme == "tcp":
        return _tcp_store(url.hostname or "", url.port or 0, world, timeout, serve=world.main)
    if url.scheme != "env":
        return None
    host, port = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdigit():
        raise ValueError("MASTER_ADDR and MASTER_PORT are not both set; the launcher does that")
    # torchrun serves the store itself, the same one for each of its restarts
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _tcp_store(host, int(port), world, timeout, serve=world.main and not agent)
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _tcp_store(host: str, port: int, world: World, timeout: timedelta, *, serve: bool) -> TCPStore:
    """The store at HOST:PORT; one on the loopback interface is served there alone."""
    listener = None
    if serve and host in LOOPBACK:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((LOOPBACK[0], port))
        except OSError as error:
            server.close()
            raise RuntimeError(f"port {port} is taken: {error.strerror}") from error
        server.listen(1024)
        listener = server.detach()
    return TCPStore(
        host,
        port,
        world.size,
        is_master=serve,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
