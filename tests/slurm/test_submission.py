"""What is submitted, seen from SLURM: sizes, arrays, chains, snapshots, refusals."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from selfsight.cluster.spec import read_json
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.slow  # minutes, on a SLURM of its own

SEER = ("model=regnety_256gf", "data=uncurated_stream")


@pytest.fixture
def site(tmp_path) -> str:
    path = tmp_path / "site.yaml"
    sections = {
        "stream": {"shards": "/data/web-{000000..009999}.tar"},
        "slurm": {
            "partition": "main", "time": "2-00:00:00", "setup": ["export SETUP_WAS_HERE=1"],
            "env": {"NCCL_DEBUG": "WARN", "WORDS": "a 'b' $HOME"}, "sbatch": {"comment": "a b; ls"},
        },
    }  # fmt: skip
    path.write_text(json.dumps(sections))
    return str(path)


def cancel(slurm: Cluster) -> None:
    slurm.call("scancel", "--user=root")


def test_the_command_as_it_is_written_leaves_a_job_of_64_nodes_with_8_gpus(slurm, site, tmp_path):
    code = Path(__file__).parents[2]
    runs = set((code / "runs").glob("*"))
    began = time.monotonic()
    done = slurm.run(
        sys.executable, "-X", "importtime", "launch/pretrain.py", *SEER, SELFSIGHT_SITE=site
    )
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "selfsight.cluster.slurm" in imported and "torch" not in imported
    assert took < 30  # a second, on a machine that does nothing else
    made = set((code / "runs").glob("*")) - runs
    try:
        job = done.stdout.split("submitted job ")[1].split(":")[0]
        assert (
            "64 nodes x 8 GPUs" in done.stdout and "auto: slurm, as sbatch is here" in done.stdout
        )
        assert f"tail -F {made and next(iter(made))}/jobs/{job}.log" in done.stdout
        assert f"scancel {job}" in done.stdout
        state = slurm.state(job)
        assert state["JobState"] == "PENDING"
        assert state["NumNodes"].startswith("64") and state["NumTasks"] == "512"
        assert state["TresPerNode"] == "gres:gpu:8"
        assert state["Partition"] == "main" and state["TimeLimit"] == "2-00:00:00"
        assert state["Requeue"] == "1"
    finally:
        cancel(slurm)
        for folder in made:
            assert folder.parent == code / "runs"
            os.system(f"rm -rf '{folder}'")


def test_the_job_holds_the_site_and_not_the_secrets(slurm, site, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "hush-hush-4711")
    run = tmp_path / "runs" / "canary"
    done = slurm.launch(
        *SEER, "cluster=slurm", f"runs_dir={run.parent}", "name=canary",
        "tracking.wandb_project=${oc.env:CANARY}", SELFSIGHT_SITE=site,
    )  # fmt: skip
    cancel(slurm)
    assert done.returncode == 0, done.stderr
    job = next(path for path in (run / "jobs").glob("*.json"))
    assert read_json(job)["config"]["data"]["shards"] == "/data/web-{000000..009999}.tar"
    whole = "".join(p.read_text(errors="replace") for p in run.rglob("*") if p.is_file())
    assert "hush-hush" not in whole + done.stdout + done.stderr
    script = next((run / "jobs").glob("[0-9]*.sh")).read_text()
    assert "export SETUP_WAS_HERE=1\n" in script and "#SBATCH --comment='a b; ls'\n" in script
    assert """export WORDS='a '"'"'b'"'"' $HOME'\n""" in script


def test_mistakes_come_before_sbatch_and_leave_nothing(slurm, site, tmp_path):
    for overrides, words in (
        ((*SEER, "data.shards=null"), "data.shards is not set"),
        ((*SEER, "batch_size=8200"), "images_per_device"),
        ((*SEER, 'name="a\nb"'), "control character"),
        ((*SEER, "cluster.partition=nowhere"), "sbatch refused the job"),
        ((*SEER, "cluster.sbatch={deadline-x: 1}"), "sbatch refused the job"),
    ):
        runs = tmp_path / "runs"
        done = slurm.launch(
            "cluster=slurm", *overrides, f"runs_dir={runs}", SELFSIGHT_SITE=site
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not any(runs.glob("*")) and done.stdout == ""
    assert slurm.call("squeue", "--noheader") == ""


@pytest.mark.slow
def test_a_sweep_is_one_array_and_each_run_has_its_folder(slurm, small_run, tmp_path):
    short = [w for w in small_run if not w.startswith(("steps=", "cluster.processes="))]
    done = slurm.launch(
        "-m", "cluster=slurm", *short, "steps=2", "device=cpu", "seed=1,2",
        f"runs_dir={tmp_path}", "name=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "sweep-0", tmp_path / "sweep-1"]
    ids = [read_json(folder / "job.json")["id"] for folder in folders]
    assert [i.split("_")[1] for i in ids] == ["0", "1"] and len({i.split("_")[0] for i in ids}) == 1
    for job, folder, seed in zip(ids, folders, (1, 2), strict=True):
        slurm.wait(job, "COMPLETED")
        assert read_json(folder / "summary.json")["status"] == "complete"
        assert f"seed: {seed}\n" in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_that_waits_is_not_submitted_twice_and_others_wait_for_it(slurm, small_run, tmp_path):
    from selfsight.build import compose
    from selfsight.config import check

    words = (*small_run, "cluster=slurm", "device=cpu", "cluster.nodes=2", f"runs_dir={tmp_path}")
    done = slurm.launch(*words, "cluster.sbatch={hold: true}", "name=first")
    assert done.returncode == 0, done.stderr
    again = slurm.launch(*words, "name=first")
    assert again.returncode == 2 and "is PENDING already" in again.stderr
    first = read_json(tmp_path / "first" / "job.json")["id"]
    chained = "\n".join(
        (
            "import sys",
            "from selfsight.build import compose",
            "from selfsight.cluster import submit",
            "from selfsight.config import check",
            f"config = check(compose('pretrain', {list(words)!r}))",
            "for name, when in (('b', 'end'), ('c', 'success')):",
            f"    after = {str(tmp_path / 'first')!r}",
            "    runs, function = [(config, name)], 'selfsight.train.pretrain'",
            "    print(submit(function, runs, after=after, when=when)[0].id)",
        )
    )
    assert check(compose("pretrain", list(words)))
    second, third = slurm.call(sys.executable, "-c", chained).split()
    assert slurm.state(second)["Dependency"].startswith(f"afterany:{first}")
    assert slurm.state(third)["Dependency"].startswith(f"afterok:{first}")
    cancel(slurm)


@pytest.mark.slow
def test_the_copy_of_the_code_is_what_runs(slurm, small_run, tmp_path):
    words = [w for w in small_run if not w.startswith(("steps=", "cluster.processes="))]
    words += ["steps=2", "device=cpu", f"runs_dir={tmp_path}", "name=copied", "cluster=slurm"]
    done = slurm.launch(*words, "cluster.sbatch={hold: true}")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "copied"
    job = read_json(run / "job.json")["id"]
    train = next((run / "code").glob("*")) / "ssl" / "selfsight" / "train.py"
    train.write_text(train.read_text() + "\nprint('the copy runs')\n")
    slurm.call("scontrol", "release", job)
    slurm.wait(job, "COMPLETED")
    assert "the copy runs" in (run / "jobs" / f"{job}.log").read_text()


@pytest.mark.slow
def test_other_package_versions_are_refused_in_the_job_and_at_the_next_submission(
    slurm, small_run, tmp_path
):
    words = [w for w in small_run if not w.startswith(("steps=", "cluster.processes="))]
    words += ["steps=2", "device=cpu", f"runs_dir={tmp_path}", "cluster=slurm"]
    done = slurm.launch(*words, "name=versions", "cluster.sbatch={hold: true}")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "versions"
    job = read_json(run / "job.json")
    spec = read_json(Path(job["file"]))
    spec["packages"]["numpy"] = "0.1"
    Path(job["file"]).write_text(json.dumps(spec))
    slurm.call("scontrol", "release", job["id"])
    slurm.wait(job["id"], "FAILED")
    assert "had numpy 0.1" in Path(job["log"]).read_text()
    assert slurm.state(job["id"])["ExitCode"] == "2:0"  # a mistake is not tried again

    done = slurm.launch(*words, "name=versions")
    assert done.returncode == 0, done.stderr
    slurm.wait(read_json(run / "job.json")["id"], "COMPLETED")
    record = read_json(run / "environment.json")
    record["versions"]["torch"] = "1.0"
    (run / "environment.json").write_text(json.dumps(record))
    done = slurm.launch(*words, "name=versions")
    assert done.returncode == 2 and "had torch 1.0" in done.stderr
    done = slurm.launch(*words, "name=versions", "cluster.environment=anyway")
    assert done.returncode == 0, done.stderr
    cancel(slurm)
