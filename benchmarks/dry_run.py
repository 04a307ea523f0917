"""One update of the SEER recipe as one rank of 512, without memory, network or values.

    python benchmarks/dry_run.py [--strategy fsdp] [--model MODEL] [--ranks 512] [--out FILE]

A rehearsal as `launch/plan.py` makes it (`selfsight.planning.rehearsal`). Printed are the bytes
that are alive at once on a rank (weights, gradients, momentum, and the peak with activations), the
work of one image, and what one rank hands to each kind of collective. Not counted: what the
allocator, cuDNN and NCCL need for themselves.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from selfsight.build import compose
from selfsight.config import check
from selfsight.planning.rehearsal import rehearse


def dry_run(overrides: list[str], ranks: int, per_node: int, strategy: str) -> dict[str, Any]:
    """Figures of one update of `overrides` as rank 0 of `ranks`."""
    found = rehearse(check(compose("pretrain", overrides)), ranks, per_node, strategy=strategy)
    return {
        "command": "python launch/pretrain.py " + " ".join(overrides),
        "ranks": ranks,
        "strategy": strategy,
        "parameters": sum(found.parameters.values()),
        "images_per_rank": found.images,
        "gigabytes_per_rank": {
            "weights": found.weights / 1e9,
            "gradients": found.gradients / 1e9,
            "momentum": found.optimizer / 1e9,
            "peak": found.peak / 1e9,
        },
        "teraflop_per_image": 2 * found.macs_per_image / 1e12,
        "collectives": found.calls,
        "gigabytes_handed_over": {k: v / 1e9 for k, v in found.traffic.items()},
        "seconds": round(found.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="regnety_256gf")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    parser.add_argument("overrides", nargs="*", help="more of pretrain's key=value")
    arguments = parser.parse_args()
    overrides = [f"model={arguments.model}", "data=synthetic", "device=cpu"]
    found = dry_run(
        [*overrides, *arguments.overrides],
        arguments.ranks,
        arguments.per_node,
        arguments.strategy,
    )
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
