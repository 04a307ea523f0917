"""Checkpoints that several ranks write together while they train."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from selfsight.distributed import async_save, checkpoint, env, payload
from selfsight.distributed.async_save import Saver
from selfsight.distributed.env import World
from tests.distributed.saves import (
    NO_LIMIT,
    deadly,
    exit_codes,
    make_state,
    names_in,
    require,
    start,
    steps_in,
)
from tests.parallel.ranks import on_ranks


def _mine(world: World, step: int) -> dict[str, torch.Tensor]:
    """Half of it is cut over the ranks, so that each has a file."""
    tensors = make_state(step)
    mesh = init_device_mesh("cpu", (world.size,))
    own = torch.full((3, 4), float(world.rank))
    return {**tensors, "own": DTensor.from_local(own, mesh, [Shard(0)])}


def _many(world: World, folder: str) -> list[str]:
    said: list[str] = []
    saver = Saver(folder, world, keep=2, notice=said.append)
    for step in range(1, 7):
        saver.save(step, _mine(world, step), {}, config_hash="")
        dist.all_reduce(torch.ones(3))  # training goes on, with collectives of its own
    assert saver.finish()
    assert [outcome.problem for outcome in saver.poll()] == [None] * 6
    assert said == []
    assert saver.newest == Path(folder) / "step_00000006"
    return [str(path) for path in checkpoint.checkpoints(Path(folder))]


def test_saves_of_three_ranks_beside_training(tmp_path):
    for found in on_ranks(3, _many, str(tmp_path)):
        assert [Path(path).name for path in found] == ["step_00000005", "step_00000006"]
    require(checkpoint.latest(tmp_path), 6)
    tensors, _ = checkpoint.load(tmp_path / "step_00000006")
    assert torch.equal(tensors["own"], torch.arange(3.0).repeat_interleave(3)[:, None].expand(9, 4))


def _one_rank_fails(world: World, folder: str) -> list:
    """Rank 1 finds its disk full, then ranks name different tensors, then one is too slow."""
    said: list[str] = []
    saver = Saver(folder, world, keep=5, notice=said.append, timeout=1)
    assert saver.save(1, _mine(world, 1), {}, config_hash="", wait=True)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    saver.save(2, _mine(world, 2), {}, config_hash="")
    assert not saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, NO_LIMIT)

    more = (
        {}
        if world.rank
        else {"another": torch.ones(2)} | {f"own{n}": torch.ones(n + 1) for n in range(3)}
    )
    saver.save(3, {**_mine(world, 3), **more}, {}, config_hash="")
    assert not saver.finish()

    if world.rank == 1:
        original, payload_write = async_save.write_tensors, payload.write_tensors

        def slow(*arguments):
            time.sleep(2.5)
            return payload_write(*arguments)

        async_save.write_tensors = slow
        saver.save(4, _mine(world, 4), {}, config_hash="")
        saver.finish()
        async_save.write_tensors = original
    else:
        saver.save(4, _mine(world, 4), {}, config_hash="")
        assert not saver.finish()
    dist.barrier()
    assert saver.save(5, _mine(world, 5), {}, config_hash="", wait=True)
    problems = [outcome.problem or "" for outcome in saver.poll()]
    return [said, problems]


def test_a_failure_of_one_rank_is_told_with_its_number(tmp_path):
    (said, problems), (quiet, others) = on_ranks(2, _one_rank_fails, str(tmp_path))
    assert quiet == []
    assert problems == others
    assert [bool(problem) for problem in problems] == [False, True, True, True, False]
    assert len(said) == 3
    assert "step 2" in said[0] and "rank 1: File too large" in said[0]
    assert "step 3" in said[1] and "ranks differ in what they save" in said[1]
    assert "step 4" in said[2] and "ranks [1] did not write their parts within 1 s" in said[2]
    assert steps_in(tmp_path) == [1, 5]
    assert names_in(tmp_path) == ["step_00000001", "step_00000005"]


def _skipping(world: World, folder: str) -> list:
    """Rank 1 alone is busy; all leave the save out."""
    said: list[str] = []
    saver = Saver(folder, world, notice=said.append, skip_when_busy=True)
    event = threading.Event()
    if world.rank == 1:

        def write(*arguments):
            assert event.wait(30)
            return payload.write_tensors(*arguments)

        async_save.write_tensors = write
    began = [saver.save(step, _mine(world, step), {}, config_hash="") for step in (1, 2)]
    event.set()
    assert saver.finish()
    began.append(saver.save(3, _mine(world, 3), {}, config_hash=""))
    assert saver.finish()
    return [began, said]


def test_a_save_is_left_out_by_all_ranks_or_none(tmp_path):
    (began, said), (others, _) = on_ranks(2, _skipping, str(tmp_path))
    assert began == others == [True, False, True]
    assert len(said) == 1
    assert steps_in(tmp_path) == [1, 3]


def _rank_that_may_die(
    rank: int, address: str, folder: Path, victim: int, calls: int, step: int
) -> None:
    torch.set_num_threads(1)
    world = env.join(rank, 2, local_rank=rank, local_size=2, address=address, timeout=30)
    saver = Saver(folder, world, timeout=1)
    dist.barrier()
    if rank == victim:
        deadly(calls)
    async_save.MARGIN = 1
    saver.save(step, _mine(world, step), {}, config_hash="")
    os._exit(0 if saver.finish() else 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "calls"),
    [*((0, n) for n in (2, 3, 5, 6, 7, 8, 9)), *((1, n) for n in (1, 2, 3, 4))],
)
def test_a_rank_that_is_killed_while_it_saves(tmp_path, victim, calls):
    """Either the new checkpoint is there or the one before is; the other rank does not hang."""
    for before in (1, 2):
        checkpoint.save(tmp_path, before, make_state(before), {}, config_hash="")
    address = f"tcp://127.0.0.1:{env.free_port()}"
    began = time.monotonic()
    codes = exit_codes(
        [start(_rank_that_may_die, rank, address, tmp_path, victim, calls, 3) for rank in range(2)]
    )
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] in (0, 3)
    assert time.monotonic() - began < 30
    path = checkpoint.latest(tmp_path)
    reached = checkpoint.verify(path)["step"] if path else 0
    assert reached in (2, 3)
    require(path, reached)
    assert reached == 3 or codes[1 - victim] == 3
    Saver(tmp_path, World()).save(4, make_state(4), {}, config_hash="", wait=True)
    assert names_in(tmp_path) == [f"step_{reached:08d}", "step_00000004"]
