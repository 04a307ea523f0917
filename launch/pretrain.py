"""Pretrain a trunk: `python launch/pretrain.py model=... data=... key=value`.

With `-m` and values separated by commas, all combinations: on SLURM as one array of jobs.
"""

from omegaconf import DictConfig

from selfsight.build import application


def sweep(runs: list[tuple[DictConfig, str]]) -> None:
    # torch is imported later, and on the machine that submits not at all
    from selfsight.cluster import run_and_exit

    run_and_exit("selfsight.train.pretrain", runs)


def pretrain(config: DictConfig, name: str) -> None:
    sweep([(config, name)])


if __name__ == "__main__":
    application("pretrain", pretrain, sweep=sweep)
