"""What a SLURM job is told: one JSON file in the run's folder, read by `supervise` and `entry`.

    runs/NAME/job.json               the job that a run was last submitted as
              jobs/STAMP.json        the file of this module, one a submission
              jobs/ID.log            what the job says
              jobs/ID.RESTART.json   how each start of it ended, written by its ranks
              code/HASH/             the code it runs

No pickle is involved, and nothing heavy is imported: the supervising process starts at once, and
signals are taken care of before torch is imported.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXIT_USER_ERROR, EXIT_FAILURE, EXIT_AGAIN, EXIT_INTERRUPTED = 2, 1, 75, 130
STATUS_CODES = {"preempted": EXIT_AGAIN, "failed": EXIT_FAILURE, "interrupted": EXIT_INTERRUPTED}


def exit_code(summary: dict[str, Any] | None) -> int:
    """The exit status of a command whose job ended with `summary`: 75 asks for another run."""
    return STATUS_CODES.get(str((summary or {}).get("status")), 0)


@dataclass(frozen=True)
class Spec:
    """One submitted run."""

    function: str
    """`selfsight.a.b.name`, called with (config, name, world)."""
    name: str
    config: dict[str, Any]
    """Of plain values; interpolations stay, but for those of the site file."""
    folder: str
    """The run's, absolute."""
    code: str
    """The snapshot's folder, absolute."""
    code_hash: str
    commit: str | None
    packages: dict[str, str | None]
    """Versions at submission; see `packages.py`."""
    processes: int
    per_node: int
    restarts: int
    """Failures in a row, without a new checkpoint between them, that are tried again."""
    srun: list[str]
    """Arguments of srun."""

    @property
    def jobs(self) -> Path:
        return Path(self.folder) / "jobs"

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read one; the member of a sweep is chosen by SLURM_ARRAY_TASK_ID."""
        content = json.loads(Path(path).read_text())
        if "members" in content:
            return cls.read(content["members"][int(os.environ["SLURM_ARRAY_TASK_ID"])])
        return cls(**content)


def job_id() -> str | None:
    """The SLURM job this process is in, as scontrol names it (123, or 123_4 in a sweep)."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def newest_step(folder: str | Path) -> int:
    """The newest checkpoint's step by its name, -1 without one."""
    names = (path.name for path in Path(folder, "checkpoints").glob("step_*"))
    return max((int(n[5:]) for n in names if n[5:].isdigit()), default=-1)


def write_json(path: Path, content: Any) -> None:
    """Write beside the place and rename there, readable by the owner's group as the umask says."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, or nothing where there is no whole one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
