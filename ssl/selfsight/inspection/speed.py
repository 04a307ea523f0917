"""How fast images are read: each stage on one core, then the whole loader."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selfsight.data.loader import Loader
from selfsight.data.multicrop import MultiCrop
from selfsight.data.sources.source import Source
from selfsight.data.worker import WorkerLimits
from selfsight.inspection.examine import STAGES
from selfsight.runtime import usable_cores

MOST_LANES = (
    64  # of one batch of the measured loader: small enough for many batches in some seconds
)
RATES = (100.0, 1000.0, 10_000.0)  # images/s for which cores are counted


def stage_figures(
    seconds: Mapping[str, float],
    images: int,
    slowest: tuple[float, str],
    network: int,
    rates: tuple[float, ...],
) -> dict[str, Any] | None:
    """Seconds of each stage for one usable image, bad ones included; None without any.

    `fetch` is time on the clock, the others are processor time. A source that waits for a network
    has `network` reads in flight; they are not counted among the cores that a rate needs.
    """
    if not images:
        return None
    each = {stage: max(seconds[stage], 1e-9) / images for stage in STAGES}
    core = {stage: each[stage] for stage in STAGES if not (network and stage == "fetch")}
    total = sum(core.values())
    costliest = max(core, key=lambda stage: core[stage])
    return {
        "stages": {
            stage: {
                "milliseconds": 1e3 * each[stage],
                "images_per_second": 1 / each[stage],
                "share": core[stage] / total if stage in core else None,
            }
            for stage in STAGES
        },
        "images": images,
        "reads_in_flight": network or None,
        "milliseconds": 1e3 * total,
        "images_per_second": 1 / total,
        "costliest": costliest,
        "slowest": {"milliseconds": 1e3 * slowest[0], "key": slowest[1]},
        "cores": [
            {
                "images_per_second": rate,
                "colour_by_workers": rate * total,
                "colour_on_device": rate * (total - core["colour"]),
            }
            for rate in rates
        ],
    }


def loader_figures(
    source: Source,
    multicrop: MultiCrop,
    *,
    batch_size: int,
    own_images: int,
    seed: int,
    workers: int,
    prefetch: int,
    options: Mapping[str, Any],
    limits: WorkerLimits,
    images: int,
    seconds: float,
) -> dict[str, Any]:
    """Run the loader of one process for up to so many images or seconds, after a first batch.

    Of the batch of a process (`own_images`) it takes at most `MOST_LANES` lanes.
    """
    lanes = max(d for d in range(1, min(MOST_LANES, own_images) + 1) if batch_size % d == 0)
    found: dict[str, Any] = {
        "workers": min(workers, lanes),
        "colour": "workers" if multicrop.colour else "device",
        "lanes": lanes,
    }
    try:
        with Loader(
            source,
            multicrop,
            batch_size=batch_size,
            seed=seed,
            world_size=batch_size // lanes,
            workers=workers,
            prefetch=prefetch,
            options=options,
            limits=limits,
        ) as loader:
            next(loader)  # starts the workers
            read, start = 0, time.perf_counter()
            while True:
                read += len(next(loader))
                took = time.perf_counter() - start
                if took > seconds or read >= images:
                    break
    except (ValueError, RuntimeError) as error:
        return {**found, "failed": str(error)}
    return {**found, "images": read, "seconds": took, "images_per_second": read / took}


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "load": load,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
