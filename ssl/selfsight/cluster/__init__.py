"""Where a job runs: this machine, one process a device."""

from selfsight.cluster.local import launch

__all__ = ["launch"]
