"""Submits runs to SLURM: a snapshot of the code, one file that says what to do, one job script.

submitit writes the script and calls sbatch. What the script runs is ours (`supervise`), and not
submitit's pickled function: that would import the checkout as it is when the job starts, begins
after torch is imported, with signals deadly until then, and hears of a preemption on rank 0 only.
"""

import contextlib
import io
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import FailedJobError, FailedSubmissionError

from selfsight.cluster import packages, site, snapshot
from selfsight.cluster.plan import Plan, plan
from selfsight.cluster.spec import Spec, read_json, write_json
from selfsight.config import ConfigError
from selfsight.tracking import revision

RESTARTS = 3
AFTER = ("end", "success")
_SOURCES = ("shards", "path", "root", "urls")  # arguments of a source that say where images are
_LEAF = "%j.log"


@dataclass(frozen=True)
class Submitted:
    """A job that waits or runs: its id as SLURM has it, its log, and what it runs on."""

    id: str
    log: Path
    folder: Path
    plan: Plan

    def lines(self) -> list[str]:
        """What to tell the user."""
        return [
            f"submitted job {self.id}: {self.plan}",
            f"log:    {self.log}",
            f"follow: tail -F {shlex.quote(str(self.log))}   or   squeue -j {self.id}",
            f"stop:   touch {shlex.quote(str(self.folder / 'stop'))}   (saves first)   "
            f"or   scancel {self.id}",
        ]


class _Executor(submitit.SlurmExecutor):
    """submitit's, with a command of ours in the script; `members` makes it an array."""

    def __init__(self, folder: Path, command: str, members: int | None) -> None:
        super().__init__(folder)
        self._command, self._members = command, members

    def send(self) -> str:
        """Write the script, call sbatch; returns the job's id."""
        if self._members is not None:
            self.parameters["map_count"] = self._members
        return self._submit_command(self._command).job_id


def submit(
    function: str,
    runs: Sequence[tuple[DictConfig, str]],
    *,
    folder: Path | None = None,
    after: str | Path | None = None,
    when: str = "end",
) -> list[Submitted]:
    """Submit runs of `function(config, name, world)`: one as a job, several as one array.

    Args:
        function: `selfsight.a.b.name`.
        runs: (checked configuration, name of the run) of each.
        folder: where the job's files go, of a single run; null: its run's folder. Another job of
            that folder that still waits or runs is not joined by a second.
        after: the folder of a run, or the id of a job, that comes first.
        when: it starts when that job has ended (`end`), or only if it ended well (`success`).

    Raises:
        ConfigError: one sentence; nothing has been submitted then.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster=slurm needs sbatch, which is not here: set cluster=local")
    if not runs:
        raise ConfigError("there is nothing to submit")
    plans = [plan(config) for config, _ in runs]
    fields = [site.fields(config.cluster) for config, _ in runs]
    if len({str(x) for x in zip(plans, map(str, fields), strict=True)}) > 1:
        raise ConfigError(
            "the runs of a sweep are one array of jobs, and all need the same nodes, GPUs and "
            "limits: submit those that differ by themselves"
        )
    dependency = _dependency(after, when)
    folders = [folder or _run_folder(config, name) for config, name in runs]
    doubles = {str(place) for place in folders if folders.count(place) > 1}
    if doubles:
        raise ConfigError(f"several runs of the sweep would write to {doubles.pop()}")
    for (config, name), place in zip(runs, folders, strict=True):
        site.clean("name", name)
        if any(c in str(place) for c in "\\\n\r"):
            raise ConfigError(f"{place} holds a backslash or a newline, which a job script may not")
        _needs_data(config)
        _not_twice(place)
        anyway = "anyway" in (config.cluster.environment, config.resume)
        packages.hold_run(_run_folder(config, name), anyway)

    new = [place for place in folders if not place.exists()]  # nothing stays if sbatch refuses
    versions, commit = packages.versions(), revision.commit()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    specs, files = [], []
    for (config, name), place, planned, field in zip(runs, folders, plans, fields, strict=True):
        try:
            code, code_hash = snapshot.take(place / "code")
            (place / "jobs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run's folder {place} cannot be made ({error.strerror}): "
                "set runs_dir to a folder that can be written, and that all nodes see"
            ) from None
        restarts = config.cluster.restarts
        specs.append(
            Spec(
                function=function,
                name=name,
                config=_content(config),
                folder=str(place),
                code=str(code),
                code_hash=code_hash,
                commit=commit,
                packages=versions,
                processes=planned.processes,
                per_node=planned.per_node,
                restarts=RESTARTS if restarts is None else restarts,
                srun=_srun(config, field),
            )
        )
        files.append(_free(place / "jobs", stamp))
        specs[-1].write(files[-1])
    parallel = runs[0][0].cluster.parallel
    if len(runs) == 1:
        work, leaf, file = folders[0] / "jobs", _LEAF, files[0]
    else:
        work = folders[0].parent / f"sweep-{stamp}"
        work.mkdir(exist_ok=True)
        leaf, file = "%A_%a.log", work / "members.json"
        write_json(file, {"members": [str(path) for path in files]})
    try:
        number = _sbatch(
            specs[0], runs, plans[0], fields[0], work, leaf, file, dependency, parallel
        )
    except ConfigError:
        for place in new:
            shutil.rmtree(place, ignore_errors=True)
        if len(runs) > 1:
            shutil.rmtree(work, ignore_errors=True)
        raise
    submitted = []
    for index, (place, path) in enumerate(zip(folders, files, strict=True)):
        own = number if len(runs) == 1 else f"{number}_{index}"
        log = work / f"{own}.log"
        record = {"id": own, "file": str(path), "log": str(log), "function": function}
        write_json(place / "job.json", record | {"submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        submitted.append(Submitted(own, log, place, plans[0]))
    return submitted


def _sbatch(
    spec: Spec,
    runs: Sequence[tuple[DictConfig, str]],
    planned: Plan,
    field: dict[str, Any],
    work: Path,
    leaf: str,
    file: Path,
    dependency: str | None,
    parallel: int,
) -> str:
    """Have submitit write the script and call sbatch; returns the job's number."""
    cluster = runs[0][0].cluster
    command = shlex.join(
        [sys.executable, "-P", "-u", "-m", "selfsight.cluster.supervise", str(file)]
    )
    environment = {**field["env"], "PYTHONPATH": str(Path(spec.code) / "ssl")}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    log = str(work).replace("%", "%%") + f"/{leaf}"
    more: dict[str, Any] = {"output": log, "error": log, "requeue": True, **field["sbatch"]}
    if field["time"] is not None:
        more["time"] = field["time"]
    if field["memory"] is not None:
        number = field["memory"].replace(".", "").isdigit()
        more["mem"] = f"{int(float(field['memory']) * 1024)}M" if number else field["memory"]
    if field["reservation"] is not None:
        more["reservation"] = field["reservation"]
    if dependency is not None:
        more["dependency"] = dependency
    if planned.gpus:
        more |= _gpus(planned, cluster.gpu_request, field["gpu_type"])
    executor = _Executor(work, f"exec {command}", len(runs) if len(runs) > 1 else None)
    executor.update_parameters(
        job_name="selfsight-" + "".join(c if c.isalnum() or c in "-_." else "_" for c in spec.name),
        time=None,
        nodes=planned.nodes,
        ntasks_per_node=planned.per_node,
        cpus_per_task=cluster.cpus_per_task,
        partition=field["partition"],
        account=field["account"],
        qos=field["qos"],
        constraint=field["constraint"],
        exclusive=True if field["exclusive"] else None,
        signal_delay_s=cluster.signal_seconds,
        array_parallelism=parallel,
        setup=[*field["setup"], *exports],
        wckey=None,
        use_srun=False,
        additional_parameters=more,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what it raises
            return executor.send()
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        said = [line.strip() for line in str(error).splitlines() if "error:" in line]
        raise ConfigError(
            f"sbatch refused the job: {'; '.join(said) or ' '.join(str(error).split())}"
        ) from None


def _gpus(planned: Plan, request: str, kind: str | None) -> dict[str, Any]:
    prefix = f"{kind}:" if kind else ""
    if request == "task":
        return {"gpus-per-task": f"{prefix}1"}
    if request == "gres":
        return {"gres": f"gpu:{prefix}{planned.per_node}"}
    return {"gpus-per-node": f"{prefix}{planned.per_node}"}


def _srun(config: DictConfig, field: dict[str, Any]) -> list[str]:
    """Arguments of srun: one rank that fails ends the others, and what a site adds."""
    arguments = ["--kill-on-bad-exit=1", "--unbuffered"]
    if config.cluster.cpus_per_task is not None:  # not taken over from sbatch since SLURM 22.05
        arguments.append(f"--cpus-per-task={config.cluster.cpus_per_task}")
    if field["container"] is not None:
        arguments.append(f"--container-image={field['container']}")
        mounts = ",".join(field["container_mounts"])
        arguments += [f"--container-mounts={mounts}"] if mounts else []
    return [*arguments, *field["srun"]]


def _content(config: DictConfig) -> dict[str, Any]:
    """The configuration for the job: what the site file says is filled in, as the job's machine
    may have another; the rest stays as composed (a secret of the environment stays there)."""

    def walk(node: Any) -> Any:
        if isinstance(node, DictConfig):
            return {key: leaf(node, key) for key in node}
        return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node

    def leaf(parent: DictConfig, key: Any) -> Any:
        raw = parent._get_node(key)
        if OmegaConf.is_interpolation(parent, key):
            text = str(raw._value())  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            if not text.startswith("${site:"):
                return text
            value = parent[key]
            return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        return walk(parent[key])

    content = walk(config)
    content["runs_dir"] = str(Path(config.runs_dir).expanduser().absolute())
    return content


def _dependency(after: str | Path | None, when: str) -> str | None:
    if after is None:
        return None
    if when not in AFTER:
        raise ConfigError(f"when={when} is not one of {', '.join(AFTER)}")
    text = str(after)
    if not text.replace("_", "").isdigit():
        record = read_json(Path(after).expanduser() / "job.json")
        if "id" not in record:
            raise ConfigError(f"after={after} is no job's id, and no folder of a run on SLURM")
        text = str(record["id"])
        if _state(text) is None:  # it has ended; SLURM may have forgotten it
            status = read_json(Path(after).expanduser() / "summary.json").get("status")
            if when == "success" and status != "complete":
                raise ConfigError(f"after={after}: the run ended before and is {status}")
            return None
    return f"{'afterany' if when == 'end' else 'afterok'}:{text}"


def _not_twice(folder: Path) -> None:
    if (job := read_json(folder / "job.json").get("id")) and (state := _state(str(job))):
        raise ConfigError(
            f"job {job} of {folder} is {state} already: scancel {job} ends it, another name= "
            "makes another run"
        )


def _state(job: str) -> str | None:
    """PENDING, RUNNING, ... of a job that has not ended; None otherwise."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    words = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return words[0] if words else None


def _needs_data(config: DictConfig) -> None:
    """Images of nowhere are found out before the job waits for hours."""
    source = OmegaConf.to_container(config.data.train, resolve=True)
    for key in _SOURCES:
        if isinstance(source, dict) and key in source and source[key] is None:
            hint = ", or stream.shards in the site file" if key == "shards" else ""
            raise ConfigError(f"data.{key} is not set: say where the images are{hint}")


def _run_folder(config: DictConfig, name: str) -> Path:
    return Path(config.runs_dir).expanduser().absolute() / name


def _free(jobs: Path, stamp: str) -> Path:
    number = 0
    while (path := jobs / f"{stamp}{f'-{number}' if number else ''}.json").exists():
        number += 1
    return path
