"""From one command to jobs: evaluations of features together, and each run that trains."""

import time
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from selfsight.evals import settings

Jobs = list[tuple[str, Sequence[tuple[DictConfig, str]]]]
FEATURES = "selfsight.evals.job.evaluate"
LOOP = "selfsight.train.pretrain"


def plan_jobs(config: DictConfig) -> Jobs:
    """(function, its runs) of each job, in order.

    Raises:
        ValueError: what is to be trained cannot be composed; one sentence.
    """
    out = settings.place(config)
    config = config.copy()
    config.out = str(out.absolute())
    trains, measures = {}, {}
    for name, node in config.eval.items():
        (trains if ".training." in node._target_ else measures)[str(name)] = node
    jobs: Jobs = []
    if measures:
        own = config.copy()
        own.eval = OmegaConf.create(measures)
        own.runs_dir = str(out / "jobs")
        jobs.append((FEATURES, [(own, f"{'-'.join(measures)}-{time.strftime('%Y%m%d-%H%M%S')}")]))
    if trains:
        from selfsight.evals.training import plan_runs

        jobs += [(LOOP, plan_runs(config, name, node)) for name, node in trains.items()]
    return jobs
