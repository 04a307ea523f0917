"""What features are worth: `python launch/evaluate.py eval=NAME[,NAME...] run=runs/NAME data=...`.

Evaluations of features are one job. One that trains is a run of the loop for each of its repeats.
"""

import sys

from omegaconf import DictConfig

from selfsight.build import EXIT_USER_ERROR, application
from selfsight.evals.settings import check_evaluation, expand


def evaluate(config: DictConfig, name: str) -> None:
    # torch is imported later, and on the machine that submits not at all
    from selfsight.cluster import run_and_exit
    from selfsight.evals.plans import plan_jobs

    for function, runs in plan_jobs(config):
        run_and_exit(function, runs)


if __name__ == "__main__":
    try:
        sys.argv[1:] = expand(sys.argv[1:])
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    application("evaluate", evaluate, named_after=(), check=check_evaluation)
