"""One real update of the whole SEER recipe on one CPU machine: peak memory and time.

    python benchmarks/seer_step.py [--out FOLDER]

RegNetY-256GF with its head and 16,000 prototypes, 1,431,032,042 parameters: weights, gradients and
momentum are 17.2 GB in fp32, so 24 GiB suffice only if nothing copies them whole. Crops are fewer
and smaller than the recipe's, the precision is fp32; all else is `model=regnety_256gf`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OVERRIDES = [
    "model=regnety_256gf",
    "data=synthetic",
    "images=null",
    "steps=1",
    "batch_size=4",
    "images_per_device=2",
    "precision=fp32",
    "views.global.size=64",
    "views.local.size=32",
    "views.local.count=2",
    "schedule.warmup_steps=0",
    "sync_batchnorm_group=null",
    "loader.workers=0",
    "data.eval_size=64",
    "data.eval_limit=[8,4]",
    "tracking.wandb=off",
    "checkpoint.at_end=false",
    "device=cpu",
    "name=step",
]


def one_step(runs: Path) -> dict[str, object]:
    """Run the step; what was measured, and the run's summary."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *OVERRIDES, f"runs_dir={runs}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = (runs / "step" / "metrics.jsonl").read_text().splitlines()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "command": "python launch/pretrain.py " + " ".join(OVERRIDES),
        "peak_resident_gib": round(peak / 2**30, 2),
        "seconds_whole_command": round(seconds, 1),
        "metrics": [json.loads(line) for line in lines],
        "summary": json.loads((runs / "step" / "summary.json").read_text()),
        "environment": json.loads((runs / "step" / "environment.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for figures.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = one_step(Path(folder))
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "figures.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
