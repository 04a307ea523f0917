"""`cluster=env` under the real torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from selfsight.cluster.spec import read_json
from tests.runs import ROOT, arguments, checksums, pictures, run_command, run_here


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "--standalone", "--local-addr=127.0.0.1", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torchrun_makes_the_world_and_the_bits_are_the_same(tmp_path):
    data = pictures(tmp_path / "pictures")
    run_here(arguments(data, tmp_path, "local", "cluster=local", "cluster.processes=2", "steps=4"))
    words = arguments(data, tmp_path, "torchrun", "cluster=auto", "steps=4")
    done = torchrun("launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "torchrun"
    assert read_json(run / "environment.json")["world_size"] == 2
    assert checksums(run, 4) == checksums(tmp_path / "local", 4)
    assert "chosen: 'env: RANK, WORLD_SIZE and MASTER_ADDR are set'" in (
        Path(run, "config.yaml").read_text()
    )


def test_a_world_that_is_not_there_is_one_sentence(tmp_path):
    status, _, said = run_command(["cluster=env", f"runs_dir={tmp_path / 'runs'}"])
    assert status == 2
    assert said.count("\n") == 1 and "start it with torchrun, or set cluster=local" in said
