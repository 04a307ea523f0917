"""What does a checkpoint cost: the loop's stall, and the time until it can be resumed from?

    python benchmarks/checkpoint.py [--quick] [--folder FOLDER] [--out FILE.json]

0.7 GB of state in tensors of the shapes of RegNetY-16GF, weights and momentum. Two questions:

- The stall: how long `Saver.save` holds the loop, beside one copy of the same bytes from one block
  of memory to another (goal: at most 1.5 times).
- The full save: the time from the call until the checkpoint has its name, hashed, flushed, and read
  back from the disk, beside a bare write of the same bytes and one fsync (goal: at most 2.5 times).

The two of a pair take turns in one process on one thread, after one warm-up each; figures are
medians. FOLDER (default: a temporary one beside this script) decides which disk is measured. Also
told, without a goal: a save while the loop waits, reading it all back, and what the writing thread
takes from a loop that computes beside it.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from selfsight.distributed import checkpoint
from selfsight.distributed.async_save import Saver
from selfsight.distributed.env import World

GOALS = {"stall": 1.5, "full save": 2.5}
BYTES, QUICK_BYTES = 700_000_000, 70_000_000
BLOCK = 1 << 24


def state_of(size: int) -> dict[str, Tensor]:
    """Weights and momentum of whole RegNetY-16GF-like stages until `size` bytes are reached."""
    widths, depths, group = (224, 448, 1232, 3024), (2, 4, 11, 1), 112
    shapes: list[tuple[int, ...]] = [(32, 3, 3, 3)]
    before = 32
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            shapes += [(width, before, 1, 1), (width, group, 3, 3), (width, width, 1, 1)]
            shapes += [(before // 4, width, 1, 1), (width, before // 4, 1, 1), *[(width,)] * 12]
            before = width
    tensors: dict[str, Tensor] = {}
    left = size // 4
    while left:
        for shape in shapes:
            tensor = torch.rand(shape).flatten()[:left]
            tensors[f"tensor{len(tensors):04d}"] = tensor.view(
                shape if tensor.numel() == torch.Size(shape).numel() else -1
            )
            left -= tensor.numel()
            if not left:
                break
    return tensors


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def raw_write(path: Path, block: Tensor) -> None:
    """The bytes into a new file, in large pieces, and one fsync."""
    data = block.numpy().data
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), BLOCK):
            piece = data[start : start + BLOCK]
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())


def loop_step(matrix: Tensor) -> None:
    """Some milliseconds of computing, as a step of training would."""
    torch.mm(matrix, matrix)


def measure(folder: Path, size: int, repeats: int) -> dict[str, object]:
    """All figures, in seconds, and the two ratios."""
    tensors = state_of(size)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    block = torch.randint(0, 255, (total,), dtype=torch.uint8)
    other = torch.empty_like(block)
    saver = Saver(folder / "checkpoints", World(), notice=print)
    saver.reserve(tensors)
    matrix = torch.rand(512, 512)
    names = ("copy", "stall", "raw", "full", "waiting", "read", "step alone", "step beside")
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        now: dict[str, float] = {"copy": seconds(lambda: other.copy_(block))}
        alone = [seconds(lambda: loop_step(matrix)) for _ in range(20)]
        now["raw"] = seconds(lambda: raw_write(folder / "raw", block))
        saver.save(2 * number, tensors, {}, config_hash="")
        beside = []
        while saver._thread is not None and saver._thread.is_alive() and len(beside) < 2000:
            if number % 2:  # every other save has no company: that one is timed
                beside.append(seconds(lambda: loop_step(matrix)))
            else:
                time.sleep(0.01)
        assert saver.finish()
        (outcome,) = saver.poll()
        now["stall"] = outcome.held
        assert saver.save(2 * number + 1, tensors, {}, config_hash="", wait=True)
        now["waiting"] = saver.poll()[0].held
        target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        newest = saver.newest
        assert newest is not None
        now["read"] = seconds(lambda path=newest, own=target: checkpoint.load_into(own, path))
        now["full"] = outcome.seconds
        if number:
            for name, value in now.items():
                if name != "full" or not number % 2:
                    found[name].append(value)
            found["step alone"] += alone
            found["step beside"] += beside
    median = {name: statistics.median(values) for name, values in found.items() if values}
    return {
        "bytes": total,
        "tensors": len(tensors),
        "seconds": median,
        "all": {name: values for name, values in found.items() if not name.startswith("step")},
        "stall": median["stall"] / median["copy"],
        "full save": median["full"] / median["raw"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes, fewer repeats")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix=".checkpoint_", dir=options.folder))
    try:
        size = QUICK_BYTES if options.quick else BYTES
        record = measure(folder, size, 4 if options.quick else options.repeats)
    finally:
        shutil.rmtree(folder)
    record |= {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}
    print(f"{record['bytes']:,} bytes in {record['tensors']} tensors")
    figures = record["seconds"]
    assert isinstance(figures, dict)
    for name, value in figures.items():
        print(f"  {name:12s} {1000 * value:9.1f} ms")
    for name, goal in GOALS.items():
        ratio = record[name]
        print(f"{name}: {ratio:.2f} times the bare one; goal {goal}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
