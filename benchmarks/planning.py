"""What launch/plan.py predicts beside what a real update needs, on CPU.

    python benchmarks/planning.py [--out FILE] [NAME ...]

Memory: the peak of a rehearsal (shapes only) beside the bytes of all tensors alive at the peak of a
real update, counted by the same meter."""

import argparse
import json
from pathlib import Path
from typing import Any

from selfsight.build import compose
from selfsight.config import check
from selfsight.planning.measure import measured_peak
from selfsight.planning.rehearsal import rehearse

COMMON = (
    "device=cpu cluster.threads=1 tracking.wandb=off steps=1000 images=null epochs=null "
    "images_per_device=null sync_batchnorm_group=null precision=fp32"
)
SMALL = "data=folder views.global.size=96 views.local.size=64"
CONFIGS = {  # images of an update, and the configuration
    "demo": (64, "data=synthetic"),
    "demo, checkpointing": (64, "data=synthetic activation_checkpointing=true"),
    "RegNetY-400MF, SGD": (8, f"{SMALL} model=regnety_400mf optim=sgd"),
    "RegNetY-200MF, queue, bf16": (
        16,
        "data=folder model=regnety_200mf method.queue_length=640 precision=bf16",
    ),
    "ViT-Tiny, AdamW": (8, f"{SMALL} model=vit_tiny optim=adamw"),
    "DINO, ViT-Tiny": (
        4,
        f"{SMALL} method=dino model=vit_tiny method.head.prototypes=4096 views.local.count=2",
    ),
}


def compare(overrides: list[str], images: int) -> dict[str, Any]:
    """Predicted and real peaks of one update, in bytes."""
    config = check(compose("pretrain", [*COMMON.split(), f"batch_size={images}", *overrides]))
    found = rehearse(config, 1, 1)
    real = measured_peak(config, images)
    return {
        "images": images,
        "predicted": found.peak,
        "measured": real,
        "error": found.peak / real - 1,
        "parameters": sum(found.parameters.values()),
        "activations": found.activations,
        "states": found.states,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    parser.add_argument("names", nargs="*", help="configurations; all by default")
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.names or CONFIGS:
        images, overrides = CONFIGS[name]
        rows[name] = row = compare(overrides.split(), images)
        print(
            f"{name:<32} {row['predicted'] / 1e6:9.1f} MB predicted {row['measured'] / 1e6:9.1f} "
            f"MB measured {row['error']:+.1%}",
            flush=True,
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
