"""Runs a job where it should run: chosen, said, and without importing torch before it is needed."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfsight.cluster import places, site, snapshot
from selfsight.cluster.slurm import submit
from selfsight.cluster.spec import exit_code


def choose(asked: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str | None]:
    """Where a job runs (`local`, `slurm`, `env`, or `srun`: as one of the processes of an srun),
    and, for `auto`, why."""
    if asked != "auto":
        return asked, None
    if places.made_by_a_launcher(environ):
        return "env", "RANK, WORLD_SIZE and MASTER_ADDR are set"
    if places.made_by_srun(environ):
        job, tasks = environ.get("SLURM_JOB_ID"), environ["SLURM_STEP_NUM_TASKS"]
        return "srun", f"job {job} started {tasks} processes of it"
    if "SLURM_JOB_ID" in environ:
        return "local", f"this is inside the SLURM job {environ['SLURM_JOB_ID']}"
    if shutil.which("sbatch", path=environ.get("PATH")):
        if not _configured(environ):
            return "local", "sbatch is here and knows no cluster"
        return "slurm", "sbatch is here"
    return "local", "there is no sbatch here"


def _configured(environ: Mapping[str, str]) -> bool:
    """Whether SLURM's programs know of a cluster: installed, they may not. One whose controller is
    down is known."""
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None:
        return True
    try:
        done = subprocess.run(
            [scontrol, "ping"], env=dict(environ), capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "configuration source" not in done.stderr


def launch(config: DictConfig, name: str, function: str) -> dict[str, Any]:
    """Run `function(config, name, world)` on all processes of its job, or submit it.

    Args:
        config: checked; `config.cluster` says where.
        name: of the run.
        function: `selfsight.a.b.name`.

    Returns:
        The summary of the job: rank 0's here, `{"status": "submitted", "job": id}` on SLURM.

    Raises:
        ValueError: what was asked for cannot be done; one sentence.
    """
    site.read_site()  # a mistake in it is told here
    kind, why = choose(config.cluster.kind)
    if why is not None:
        config.cluster.chosen = f"{kind}: {why}"
    if kind == "slurm":
        return _submitted(function, [(config, name)], why)[0]
    _introduce_code(name)
    if kind == "local":
        from selfsight.cluster import local, ranks

        return local.launch(config, name, ranks.find(function))
    from selfsight.distributed import preempt

    preempt.arm()
    from selfsight.cluster import ranks

    environ = os.environ
    place = places.from_environment(environ) if kind == "env" else places.from_slurm(environ)
    return ranks.run(place, config, name, function)


def sweep(runs: Sequence[tuple[DictConfig, str]], function: str) -> list[dict[str, Any]]:
    """Run several runs: on SLURM as one array of jobs, elsewhere one after the other. The first
    that does not end well ends the sweep here.

    Raises:
        ValueError: as `launch`.
    """
    site.read_site()
    kind, why = choose(runs[0][0].cluster.kind)
    if kind == "slurm":
        for config, _ in runs:
            config.cluster.chosen = None if why is None else f"{kind}: {why}"
        return _submitted(function, runs, why)
    summaries = []
    for config, name in runs:
        summaries.append(launch(config, name, function))
        if exit_code(summaries[-1]):
            break
    return summaries


def run_and_exit(function: str, runs: Sequence[tuple[DictConfig, str]]) -> None:
    """`launch` or `sweep` as a command does it: ends the process if its status is not 0."""
    summaries = [launch(*runs[0], function)] if len(runs) == 1 else sweep(runs, function)
    if code := exit_code(summaries[-1]):
        sys.exit(code)


def _submitted(
    function: str, runs: Sequence[tuple[DictConfig, str]], why: str | None
) -> list[dict[str, Any]]:
    jobs = submit(function, runs)
    print(f"selfsight: cluster={'slurm' if why is None else f'auto: slurm, as {why}'}")
    for job in jobs:
        print("\n".join(f"selfsight: {line}" for line in job.lines()))
    return [{"status": "submitted", "job": job.id, "log": str(job.log)} for job in jobs]


def _introduce_code(name: str) -> None:
    """What the start-up checks and the lease know this job by, as `supervise` sets it on SLURM."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job in (None, "none", ""):
        job = f"{platform.node()}-{os.getpid()}-{int(time.time())}"
        if "RANK" in os.environ:  # the same for all ranks
            job = f"{os.environ['MASTER_ADDR']}-{os.environ.get('MASTER_PORT')}-{name}"
    os.environ.setdefault("SELFSIGHT_JOB_ID", str(job))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    os.environ.setdefault("SELFSIGHT_RESTART", restart)
    os.environ["SELFSIGHT_CODE"] = snapshot.code_hash(Path(__file__).parents[3])
