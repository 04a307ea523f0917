"""Runs on a real SLURM: 2 nodes x 2 processes, left alone and disturbed in every way that counts.

However a run was disturbed, its last checkpoint equals that of an undisturbed one, byte for byte.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.runs import checksums, run_here
from tests.slurm.conftest import Cluster, summary

pytestmark = pytest.mark.slow  # minutes, on a SLURM of its own

NODES = "cluster.nodes=2"


@pytest.fixture(scope="session")
def undisturbed(small_run, tmp_path_factory) -> dict[str, str]:
    """The checksums of the last checkpoint of the same run by four processes of this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here([*small_run, "cluster=local", f"runs_dir={folder}", "name=calm"])
    return checksums(folder / "calm", 24)


def submit(slurm: Cluster, small_run: list[str], run: Path, *more: str) -> str:
    return slurm.submit(*small_run, NODES, f"runs_dir={run.parent}", f"name={run.name}", *more)


def ends_as(undisturbed: dict[str, str], slurm: Cluster, job: str, run: Path) -> dict[str, str]:
    state = slurm.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT", "CANCELLED")
    assert state["JobState"] == "COMPLETED", log(run)
    assert summary(run)["status"] == "complete"
    assert checksums(run, 24) == undisturbed
    return state


def log(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "jobs").glob("*.log")))


def test_a_job_is_submitted_and_finishes(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "calm"
    job = submit(slurm, small_run, run)
    state = ends_as(undisturbed, slurm, job, run)
    assert state["Restarts"] == "0" and state["NumNodes"] == "2" and state["NumTasks"] == "4"
    assert "done: 24 updates" in log(run)


def test_a_preempted_job_saves_and_goes_on(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "preempted"
    job = submit(slurm, small_run, run)
    slurm.wait_for_checkpoint(run, after=4)
    other = slurm.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    slurm.wait(other, "COMPLETED")
    state = ends_as(undisturbed, slurm, job, run)
    assert int(state["Restarts"]) >= 1
    assert "saved; queueing the job again" in log(run)


def test_a_node_that_dies_is_left_behind(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "node"
    job = submit(slurm, small_run, run)
    slurm.wait_for_checkpoint(run, after=4)
    slurm.kill_node("node2")
    try:
        slurm.wait(job, "PENDING", "RUNNING", seconds=30)
        end = time.monotonic() + 240
        while slurm.state(job)["Restarts"] == "0":
            assert time.monotonic() < end, log(run)
            time.sleep(0.3)
    finally:
        slurm.boot_node("node2")
    ends_as(undisturbed, slurm, job, run)


@pytest.mark.slow
def test_a_killed_process_is_started_again(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "task"
    job = submit(slurm, small_run, run)
    slurm.wait_for_checkpoint(run, after=4)
    os.kill(max(slurm.ranks(job)), signal.SIGKILL)
    state = ends_as(undisturbed, slurm, job, run)
    assert state["Restarts"] == "0"
    assert "failure 1 in a row" in log(run)


@pytest.mark.slow
def test_a_job_that_is_queued_again_from_outside_goes_on(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "requeued"
    job = submit(slurm, small_run, run)
    slurm.wait_for_checkpoint(run, after=4)
    slurm.call("scontrol", "requeue", job)
    assert ends_as(undisturbed, slurm, job, run)["Restarts"] == "1"


@pytest.mark.slow
def test_the_warning_before_the_time_limit_is_heeded(slurm, small_run, undisturbed, tmp_path):
    run = tmp_path / "limit"
    longer = [w for w in small_run if not w.startswith("steps=")]
    job = submit(slurm, longer, run, "steps=3000", "cluster.time=1", "cluster.signal_seconds=40")
    end = time.monotonic() + 300
    while slurm.state(job)["Restarts"] == "0":
        assert time.monotonic() < end, log(run)
        assert slurm.state(job)["JobState"] != "TIMEOUT", log(run)
        time.sleep(0.5)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    assert "saved; queueing the job again" in log(run)
    job = submit(slurm, small_run, tmp_path / "other")
    ends_as(undisturbed, slurm, job, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_one_rank_moves_all(slurm, small_run, undisturbed, tmp_path, rank):
    run = tmp_path / "one"
    job = submit(slurm, small_run, run)
    slurm.wait_for_checkpoint(run, after=4)
    os.kill(sorted(slurm.ranks(job))[rank], signal.SIGUSR2)
    assert ends_as(undisturbed, slurm, job, run)["Restarts"] == "1"


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_away(slurm, small_run, tmp_path):
    run = tmp_path / "cancelled"
    longer = [w for w in small_run if not w.startswith("steps=")]
    job = submit(slurm, longer, run, "steps=3000", "checkpoint.every=1000000")
    end = time.monotonic() + 240
    while (
        not (run / "metrics.jsonl").is_file() or "step" not in (run / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < end, log(run)
        time.sleep(0.1)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    time.sleep(5)
    assert slurm.state(job)["Restarts"] == "0"
    assert summary(run)["status"] == "preempted"


@pytest.mark.slow
def test_a_rank_that_always_fails_is_given_up(slurm, small_run, tmp_path):
    run = tmp_path / "hopeless"
    job = submit(slurm, small_run, run, "cluster.restarts=1", "checkpoint.every=1000")
    for _ in range(2):
        end = time.monotonic() + 240
        while len(ranks := slurm.ranks(job)) < 4:
            assert time.monotonic() < end, log(run)
            time.sleep(0.05)
        os.kill(ranks[0], signal.SIGKILL)
        while set(ranks) & set(slurm.ranks(job)):
            time.sleep(0.05)
    slurm.wait(job, "FAILED")
    assert "giving up (cluster.restarts=1)" in log(run)
