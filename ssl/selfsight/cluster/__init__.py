"""Where a job runs: this machine, a SLURM cluster, or a world that another launcher has made.

`launch` chooses and runs, `sweep` does so for several runs, `submit` sends to SLURM alone.
Importing this imports no torch: a submission answers at once.
"""

from selfsight.cluster.launch import launch, run_and_exit, sweep
from selfsight.cluster.slurm import submit

__all__ = ["launch", "run_and_exit", "submit", "sweep"]
