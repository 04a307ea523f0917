"""Evaluations that a pretraining run starts: at its end, and for trunks that it exports under way.

Each is a command of its own, launch/evaluate.py on the run's folder. Of a job on SLURM they are
further jobs, submitted at once. On a machine of its own, where the run has the processor or the GPU,
they wait until it has ended, and run one after the other.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from selfsight.evals.reporting import read_results, result_name, tracked_figures
from selfsight.evals.settings import evaluator_names

ROOT = Path(__file__).parents[3]


def check_names(names: Sequence[str], key: str) -> None:
    """Raise ValueError for an evaluation that does not exist."""
    known = evaluator_names()
    for name in names:
        if name not in known:
            raise ValueError(f"{key}={name} is no evaluation; there are {', '.join(known)}")


class Starter:
    """Starts the evaluations of one run, on its main rank; elsewhere it does nothing.

    Args:
        folder: of the run.
        config: of the run.
        main: whether this is the main rank.

    Raises:
        ValueError: an evaluation that does not exist.
    """

    def __init__(self, folder: Path, config: DictConfig, *, main: bool) -> None:
        check_names(config.eval.at_end, "eval.at_end")
        check_names(config.eval.at_checkpoints, "eval.at_checkpoints")
        every = config.checkpoint.keep_every
        if config.eval.at_checkpoints and every is None:
            raise ValueError(
                "eval.at_checkpoints evaluates the trunks that checkpoint.keep_every exports: set it"
            )
        self.folder, self._every = folder, every
        self.at_end, self.at_checkpoints = (
            list(config.eval.at_end),
            list(config.eval.at_checkpoints),
        )
        chosen = str(config.cluster.chosen or config.cluster.kind)
        self.submits = chosen.startswith("slurm")
        self._main = main
        self._waiting: list[int] = []
        self._told: set[str] = set()

    def saved(self, step: int) -> None:
        """A checkpoint of that step has been saved, and with some of them a trunk."""
        if not (self._main and self.at_checkpoints and step % self._every == 0):
            return
        if self.submits:
            self._start(self.at_checkpoints, step)
        else:
            self._waiting.append(step)

    def ended(self) -> None:
        """The run is complete."""
        if not self._main:
            return
        for step in self._waiting:
            self._start(self.at_checkpoints, step)
        self._waiting.clear()
        if self.at_end:
            self._start(self.at_end, None)

    def news(self) -> dict[str, float]:
        """Figures of results that have come since this was asked last."""
        found: dict[str, float] = {}
        if self._main and (self.at_end or self.at_checkpoints):
            for result in read_results(self.folder / "evals"):
                name = result_name(result)
                if name not in self._told:
                    self._told.add(name)
                    found |= tracked_figures(result)
        return found

    def command(self, names: Sequence[str], step: int | None) -> list[str]:
        """The command line that evaluates the run."""
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"eval={','.join(names)}"]
        command += [
            f"run={self.folder.absolute()}",
            f"cluster={'slurm' if self.submits else 'local'}",
        ]
        return command if step is None else [*command, f"step={step}"]

    def _start(self, names: Sequence[str], step: int | None) -> None:
        what = f"{', '.join(names)}{'' if step is None else f' at step {step}'}"
        # the evaluation joins no world of this run's
        ours = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )
        environ = {
            k: v
            for k, v in os.environ.items()
            if k not in ours
            and not k.startswith(("SELFSIGHT_JOB", "SELFSIGHT_RESTART", "SELFSIGHT_MEET"))
        }
        environ["PYTHONPATH"] = str(ROOT / "ssl")
        done = subprocess.run(
            self.command(names, step), env=environ, capture_output=True, text=True
        )
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines()
            print(f"evaluation {what} did not go well: {words[-1] if words else done.returncode}")
            return
        for line in done.stdout.strip().splitlines():
            if self.submits or ":" in line:
                print(line)
