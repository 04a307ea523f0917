"""Joining and leaving a world."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from selfsight.distributed import env
from tests.parallel.ranks import on_ranks


def test_world_of_one_starts_no_process_group():
    world = env.join()
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert world.device == torch.device("cpu")
    assert not dist.is_initialized()
    env.leave()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"rank": 2, "size": 2}, "rank 2 does not exist"),
        ({"size": 2, "local_rank": 1, "local_size": 1}, "local rank 1"),
        ({"size": 6, "local_size": 4}, "whole nodes of 4"),
    ],
)
def test_impossible_places_are_refused(place, said):
    with pytest.raises(ValueError, match=said):
        env.World(**place)


def test_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", env.free_port()))


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"GPU \d+ was asked for"):
        env.join(device=f"cuda:{torch.cuda.device_count()}")


def test_ranks_that_do_not_come_are_an_error_and_the_process_can_go_on():
    with pytest.raises(ConnectionError, match="rank 1 of 2 did not come"):
        env.join(0, 2, local_size=2, address=f"tcp://127.0.0.1:{env.free_port()}", timeout=1)
    assert not dist.is_initialized()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_so_they_are_in_a_world_that_another_launcher_made(host, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(env.free_port()))
    with pytest.raises(ConnectionError, match="rank 1 of 2 did not come"):
        env.join(0, 2, local_size=2, timeout=1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConnectionError, match="MASTER_ADDR and MASTER_PORT"):
        env.join(0, 2, local_size=2, timeout=1)


def _rejoin(world: env.World, address: str) -> list[str]:
    """Leave, and join again by a file; then name the addresses on which this process listens."""
    env.leave()
    again = env.join(
        world.rank, world.size, local_size=2, local_rank=world.rank, address=address, timeout=30
    )
    assert again == world
    listening = _listening_addresses()
    dist.barrier()
    return listening


def _listening_addresses() -> list[str]:
    """IPv4 and IPv6 addresses of this process's listening sockets, from /proc (Linux)."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (a link may vanish meanwhile)
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:  # noqa: PTH123
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append(fields[1].split(":")[0])
    return found


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's /proc")  # noqa: PTH110
def test_local_ranks_rejoin_and_listen_on_loopback_only(tmp_path):
    for listening in on_ranks(2, _rejoin, f"file://{tmp_path}/store"):
        assert listening, "gloo listens somewhere"
        assert set(listening) == {"0100007F"}  # 127.0.0.1 in the kernel's byte order


def _listening(world: env.World) -> list[str]:
    return _listening_addresses()


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's /proc")  # noqa: PTH110
def test_the_store_of_local_ranks_listens_on_loopback_only():
    for listening in on_ranks(2, _listening):
        assert set(listening) == {"0100007F"}
