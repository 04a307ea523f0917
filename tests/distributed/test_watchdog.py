"""Hangs end in time, with a non-zero status and the name of the rank that is missing."""

import dataclasses
import multiprocessing
import os
import re
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from selfsight.distributed import collectives, env, watchdog
from selfsight.distributed.watchdog import GRACE, Beat, Limits, Watchdog, diagnose
from tests.parallel.ranks import PRELOADED

LIMIT = 2.0


def _rank(folder: Path, rank: int, size: int, port: int, fault: str, limit: float) -> None:
    """Six steps of two collectives, rank 1 with a fault in step 3."""
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT, 0o644), 2)
    place = {"local_rank": rank, "local_size": size, "address": f"tcp://127.0.0.1:{port}"}
    world = env.join(rank, size, **place, timeout=120)
    limits = Limits(first=60, step=limit, evaluation=2 * limit, save=60)
    dog = Watchdog(world, folder, limits)
    for step in range(6):
        culprit = rank == 1 and step == 3
        dog.enter("data", step)
        if culprit and fault == "stuck":
            time.sleep(1000)
        dog.enter("forward", step)
        if culprit and fault == "stop":
            time.sleep(2 * dog.interval)
            (folder / "stops").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        collectives.all_reduce_sum(torch.ones(3))
        dog.enter("update", step)
        if culprit and fault == "skip":
            (folder / "stops").touch()
            dog.enter("data", step + 1)
            dog.enter("forward", step + 1)
            collectives.barrier()
        collectives.all_reduce_sum(torch.ones(3))
        if fault == "long evaluation" and step == 3:
            with dog.within("evaluation"):
                time.sleep(1.5 * limit if rank else 0)
                collectives.barrier()
        if fault == "suspended" and step == 3:
            (folder / f"waits{rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
    dog.close()
    collectives.barrier()
    os._exit(0)


def run(folder: Path, fault: str, size: int = 2, limit: float = LIMIT) -> list[ForkServerProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = env.free_port()
    ranks = [
        context.Process(target=_rank, args=(folder, rank, size, port, fault, limit), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def until_there(*paths: Path) -> None:
    deadline = time.monotonic() + 40
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def end(folder: Path, ranks: list[ForkServerProcess], seconds: float = 40) -> list[tuple]:
    """Status and last words of each rank, ended if it does not by itself."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()
    said = [(folder / f"said{rank}").read_text() for rank in range(len(ranks))]
    return [(process.exitcode, text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("stop", r"missing: rank 1 on \S+ gives no sign of life, last in 'forward' of step 3"),
        ("skip", r"missing: rank 1 on \S+ is in 'forward' of step 4 .*wait in 'update' of step 3"),
    ],
)
def test_the_missing_rank_is_named_and_the_others_leave_in_time(tmp_path, fault, names):
    ranks = run(tmp_path, fault)
    until_there(tmp_path / "stops")
    start = time.monotonic()
    ranks[0].join(40)
    took = time.monotonic() - start
    ranks[1].kill()
    (status, said), _ = end(tmp_path, ranks, 10)
    assert status == watchdog.EXIT_STATUS
    assert took < LIMIT + GRACE
    assert re.search(names, said), said
    assert "rank 0: '" in said and "all_reduce" in said


def test_a_rank_that_is_stuck_names_itself_and_takes_the_others_along(tmp_path):
    (first, one), (second, other) = end(tmp_path, run(tmp_path, "stuck"))
    assert first and second
    assert "rank 1: 'data' of step 3 took more than" in other
    assert "missing: rank 1" in one or "Connection closed" in one, one


def test_evaluations_have_a_limit_of_their_own(tmp_path):
    ranks = run(tmp_path, "long evaluation", limit=1.5)
    assert [status for status, _ in end(tmp_path, ranks)] == [0, 0]


def test_time_in_which_the_job_is_suspended_does_not_count(tmp_path):
    ranks = run(tmp_path, "suspended", limit=4.0)
    until_there(tmp_path / "waits0", tmp_path / "waits1")
    for process in ranks:
        os.kill(process.pid or 0, signal.SIGSTOP)
    time.sleep(5)
    for process in ranks:
        os.kill(process.pid or 0, signal.SIGCONT)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert [status for status, _ in end(tmp_path, ranks)] == [0, 0]


def test_limits():
    limits = Limits(first=100, step=10, evaluation=50, save=20)
    assert limits.of("data", 0) == 100
    assert limits.of("data", 1) == 10
    assert limits.of("evaluation", 0) == 100
    assert limits.of("evaluation", 1) == 50
    assert limits.of("save", 3) == 20


def _beat(rank: int, step: int, section: str, count: int = 1, waits: bool = True) -> Beat:
    return Beat(rank, count, step, section, 5.0, "call", waits, "node")


def test_who_is_missing():
    """Every rank of 512 in its place, but one."""
    early = {r: _beat(r, 7, "update") for r in range(512)}
    late = {r: _beat(r, 7, "update", 2) for r in range(512)}
    assert "network" in diagnose(512, early, late)
    assert "rank 9 on node gives no sign" in diagnose(512, early, {**late, 9: early[9]})
    assert "rank 9 never" in diagnose(512, early, {r: b for r, b in late.items() if r != 9})
    busy = {**late, 9: _beat(9, 7, "data", 2, waits=False)}
    assert diagnose(512, early, busy).startswith("missing: rank 9 on node is in 'data' of step 7")
    ahead = {**late, 9: _beat(9, 8, "forward", 2)}
    assert "rank 9 on node is in 'forward' of step 8" in diagnose(512, early, ahead)
    gone = {**late, 9: _beat(9, 7, "left", 2)}
    assert "rank 9 on node has left" in diagnose(512, early, gone)
    passed = {**late, 9: dataclasses.replace(late[9], line=80)}
    assert "rank 9 on node is in 'update' of step 7" in diagnose(512, early, passed)
    dead = {r: (b if r > 20 else early[r]) for r, b in late.items()}
    assert "and 13 more" in diagnose(512, early, dead)
    assert "cannot be read" in diagnose(512, early, {})


def test_an_unreadable_folder_does_not_keep_a_rank_from_ending(tmp_path):
    ended = []
    dog = Watchdog(env.World(), tmp_path, Limits(first=0.5, step=0.5), exits=ended.append)
    for file in dog.folder.iterdir():
        file.unlink()
    dog.folder.rmdir()
    time.sleep(2)
    assert ended == [watchdog.EXIT_STATUS]
    dog.close()
