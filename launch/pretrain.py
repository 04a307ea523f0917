"""Pretrain a trunk: `python launch/pretrain.py model=... data=... key=value`.

With `-m` and values separated by commas, all combinations: on SLURM as one array of jobs. Here they
end in one table; `launch/results.py --study runs/*` makes it of jobs.
"""

from pathlib import Path

from omegaconf import DictConfig

from selfsight.build import application


def sweep(runs: list[tuple[DictConfig, str]]) -> None:
    # torch is imported later, and on the machine that submits not at all
    from selfsight.cluster import run_and_exit

    run_and_exit("selfsight.train.pretrain", runs)
    if len(runs) > 1 and all((folder_of(*run) / "summary.json").is_file() for run in runs):
        from selfsight.evals.table import study

        print(study([folder_of(*run) for run in runs]))


def folder_of(config: DictConfig, name: str) -> Path:
    return Path(config.runs_dir).expanduser() / name


def pretrain(config: DictConfig, name: str) -> None:
    sweep([(config, name)])


if __name__ == "__main__":
    application("pretrain", pretrain, sweep=sweep)
