"""One rank of a SLURM job: `python -m selfsight.cluster.entry JOB.json`, started by srun.

The first thing done is to note signals; torch comes later. How the job ended is written into a
file, from which `supervise` decides what comes next: exit statuses of killed and of ended ranks
get mixed up on their way through srun.
"""

# ruff: noqa: E402
from selfsight.distributed import preempt

preempt.arm()

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from selfsight.cluster.spec import EXIT_FAILURE, EXIT_USER_ERROR, Spec, write_json


def main(path: str) -> int:
    """Run this rank; returns its exit status: 0 for every orderly end."""
    spec = Spec.read(path)
    place = Path(spec.jobs, f"{os.environ['SELFSIGHT_JOB_ID']}.{os.environ['SELFSIGHT_RESTART']}")
    rank = os.environ.get("SLURM_PROCID", "0")
    try:
        summary = _run(spec)
    except ValueError as error:
        if _first(place, rank, {"status": "user error", "said": str(error)}):
            print(f"selfsight: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _first(place, rank, {"status": "interrupted"})
        return EXIT_FAILURE
    except Exception:
        trace = "".join(f"rank {rank}: {line}\n" for line in traceback.format_exc().splitlines())
        print(trace, file=sys.stderr, end="", flush=True)
        return EXIT_FAILURE
    if rank == "0":
        _first(place, rank, {"status": "complete", **summary})
    return EXIT_FAILURE if summary.get("status") == "failed" else 0


def _run(spec: Spec) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from selfsight.cluster import packages, places, ranks
    from selfsight.config import register_resolvers

    own = Path(__file__).resolve().parents[3]
    if own != Path(spec.code).resolve():
        raise ValueError(f"the job would run the code of {own} and not its copy {spec.code}")
    register_resolvers()
    config = OmegaConf.create(spec.config)
    packages.hold(
        spec.packages,
        "the machine that submitted this job",
        "anyway" in (config.cluster.environment, config.resume),
    )
    place = places.from_slurm(os.environ, meet=os.environ["SELFSIGHT_MEET"])
    return ranks.run(place, config, spec.name, spec.function)


def _first(place: Path, rank: str, content: dict[str, Any]) -> bool:
    """Write how this start ended, unless another rank has: a link is made once on any file system.
    Returns whether this rank was the first."""
    result, part = place.with_name(f"{place.name}.json"), place.with_name(f"{place.name}.r{rank}")
    try:
        write_json(part, content)
        os.link(part, result)
    except FileExistsError:
        return False
    except OSError:  # no links here: the last one stays
        write_json(result, content)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return True


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # the process group may wait for ranks that are gone
