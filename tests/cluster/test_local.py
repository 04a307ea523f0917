"""This machine's launch: what happens to its ranks happens once, and a lost one is replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfsight.cluster.spec import newest_step, read_json
from tests.runs import ROOT, arguments, checksums, pictures, run_command, run_here

LONG = ["steps=4000", "checkpoint.every=3", "cluster=local", "cluster.timeout_minutes=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


def start(overrides: list[str], said: Path) -> subprocess.Popen[bytes]:
    """Start the command; what it says goes to a file."""
    command = [sys.executable, "launch/pretrain.py", *overrides]
    with said.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def children(pid: int) -> list[int]:
    """The processes of `pid` that are ranks."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (folder / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid and b"spawn_main" in words:
            found.append(int(folder.name))
    return sorted(found)


def wait_for(what, seconds: float = 150):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_a_killed_rank_is_started_again_and_the_bits_are_the_same(data, tmp_path):
    more = ("steps=12", "checkpoint.every=3", "cluster=local", "cluster.processes=2")
    run_here(arguments(data, tmp_path, "calm", *more))
    run = tmp_path / "lost"
    said = tmp_path / "said"
    process = start(arguments(data, tmp_path, "lost", *more, "cluster.restarts=2"), said)
    try:
        wait_for(lambda: newest_step(run) >= 3)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=200) == 0, said.read_text()
    finally:
        process.kill()
    assert "starting again" in said.read_text()
    assert checksums(run, 12) == checksums(tmp_path / "calm", 12)


def test_a_signal_to_the_command_reaches_each_rank_once(data, tmp_path):
    run, said = tmp_path / "told", tmp_path / "said"
    process = start(arguments(data, tmp_path, "told", *LONG, "cluster.processes=2"), said)
    try:
        wait_for(lambda: newest_step(run) >= 3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert process.wait(timeout=150) == 0, said.read_text()
    finally:
        process.kill()
    assert read_json(run / "summary.json")["status"] == "stopped"


@pytest.mark.slow
def test_ranks_do_not_outlive_the_command(data, tmp_path):
    run, said = tmp_path / "orphans", tmp_path / "said"
    process = start(arguments(data, tmp_path, "orphans", *LONG, "cluster.processes=2"), said)
    try:
        wait_for(lambda: newest_step(run) >= 3)
        ranks = children(process.pid)
        assert len(ranks) == 2
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(_runs(pid) for pid in ranks), seconds=40)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_preempted_is_the_exit_status_75(data, tmp_path):
    run, said = tmp_path / "again", tmp_path / "said"
    process = start(arguments(data, tmp_path, "again", *LONG), said)
    try:
        wait_for(lambda: newest_step(run) >= 3)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=150) == 75, said.read_text()
    finally:
        process.kill()
    assert read_json(run / "summary.json")["status"] == "preempted"


@pytest.mark.slow
def test_other_versions_are_refused_unless_told(data, tmp_path):
    words = arguments(data, tmp_path, "versions", "steps=2", "cluster=local")
    run_here(words)
    record = tmp_path / "versions" / "environment.json"
    record.write_text(record.read_text().replace('"numpy": "', '"numpy": "0.'))
    with pytest.raises(ValueError, match=r"had numpy 0\..*cluster.environment=anyway"):
        run_here(words)
    run_here([*words, "cluster.environment=anyway"])


def test_a_model_without_slurm_and_memory_is_one_sentence(tmp_path):
    status, out, said = run_command(
        ["model=regnety_10b", "data=synthetic", "cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    )
    assert status == 2 and out == ""
    assert "needs 115.5 GB" in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_slurm_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, said = run_command(["cluster=slurm", f"runs_dir={tmp_path / 'runs'}"])
    assert status == 2
    assert said == "selfsight: cluster=slurm needs sbatch, which is not here: set cluster=local\n"
