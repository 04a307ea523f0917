"""What does one pass over crops of two sizes save against a pass for each size?

    python benchmarks/dino_multicrop.py [--images 2] [--rounds 5] [--out figures.json]

A ViT-S/16's forward and backward pass over 2x224 and 8x96 crops, as DINO's student makes it: in one
pass (`forward_views`, tokens of all crops together but for attention) and in one for each size. The
two take turns; times are medians of the process's CPU time (on CUDA, of the device's). Memory is
what autograd keeps between forward and backward, each storage counted once.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from selfsight.trunks.vit import VisionTransformer

CROPS = ((2, 224), (8, 96))


def kept_bytes(run: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, but for weights."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    total = sum(storages.values())
    loss.backward()
    return total


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run().backward()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.process_time()
    run().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trunk = VisionTransformer(width=384, depth=12, heads=6).to(device)
    views = [torch.randn(count * options.images, 3, s, s, device=device) for count, s in CROPS]
    weights = {p.untyped_storage().data_ptr() for p in trunk.parameters()}

    def together() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return torch.cat(trunk.forward_views(views)).float().square().mean()

    def apart() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return torch.cat([trunk(view) for view in views]).float().square().mean()

    ways = {"one pass": together, "a pass for each size": apart}
    values = [run().item() for run in ways.values()]
    assert abs(values[0] - values[1]) < (1e-5 if device.type == "cpu" else 1e-2), values
    memory = {name: kept_bytes(run, weights) for name, run in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    figures = {
        name: {"seconds": statistics.median(times[name]), "kept_mib": memory[name] / 2**20}
        for name in ways
    }
    for name, found in figures.items():
        print(f"{name:22s} {found['seconds']:.3f} s   {found['kept_mib']:.0f} MiB kept")
    one, each = (statistics.median(times[name]) for name in ways)
    print(f"one pass takes {one / each:.2f} of the time of separate ones")
    if options.out:
        where = {"device": str(device), "machine": platform.machine(), "torch": torch.__version__}
        record = {**where, "images": options.images, "crops": CROPS, "figures": figures}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
