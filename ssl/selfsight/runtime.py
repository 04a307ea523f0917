"""What a run needs of its process: shares of the batch, threads, memory, seeds, stops."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from selfsight.config import divisors_text
from selfsight.data.decode import DecodeLimits
from selfsight.data.pixels import RGB, PixelFormat
from selfsight.data.sources.source import Source
from selfsight.data.statistics import pixel_statistics
from selfsight.distributed import collectives
from selfsight.distributed.env import World

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shares(batch_size: int, images_per_device: int | None, ranks: int) -> tuple[int, int]:
    """This rank's images of a global batch, and the micro-batches they go through in.

    Raises:
        ValueError: the batch does not divide.
    """
    if batch_size % ranks:
        raise ValueError(
            f"batch_size={batch_size} does not divide over {ranks} processes; "
            f"{divisors_text(batch_size, ranks)}"
        )
    own = batch_size // ranks
    if images_per_device is None or images_per_device >= own:
        return own, 1
    if own % images_per_device:
        raise ValueError(
            f"the {own} images of a process (batch_size={batch_size} over {ranks}) do not divide "
            f"into images_per_device={images_per_device}; {divisors_text(own, images_per_device)}"
        )
    return own, own // images_per_device


def autocast_factory(
    device: torch.device, precision: str
) -> Callable[[], AbstractContextManager[object]]:
    """A maker of autocast contexts for `precision`: fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=PRECISIONS[precision])


def threads_per_process(asked: int | None, local_size: int) -> int:
    """Compute threads of one process: as asked, or its share of the cores but one.

    One is left to the loader, whether it has processes or not: the number of threads decides the
    last bits of a sum, and must not follow from the number of workers. (Measured on two cores with
    one loader process: 307 images/s by one thread, 294 by two.)
    """
    return asked or max(1, usable_cores() // local_size - 1)


def usable_cores() -> int:
    """Cores this process may run on (a job's share, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | None, world: World) -> int:
    """Loader processes of this rank. By default a GPU gets its share of the cores, at most 8; on
    CPU one, whose work fills the gaps that compute threads leave."""
    if asked is not None:
        return asked
    if world.device.type == "cpu":
        return 1
    return max(1, min(8, usable_cores() // world.local_size))


def colour_on_device(asked: str, device: torch.device, pixels: PixelFormat) -> bool:
    """Whether colour, blur and the like are done on the device, or by the loader's processes."""
    return asked == "device" or (asked == "auto" and device.type == "cuda" and pixels == RGB)


def decode_limits(loader: Any) -> DecodeLimits:
    """The limits that the configuration's section `loader` sets."""
    fields = DecodeLimits.__dataclass_fields__
    return DecodeLimits(**{name: loader[name] for name in fields if name in loader})


def known_pixels(pixels: Any) -> tuple[list[float], list[float]]:
    """Means and standard deviations of the channels as configured; until they are estimated, any of
    that number."""
    if pixels.estimate:
        return [0.5] * pixels.channels, [0.5] * pixels.channels
    return list(pixels.mean), list(pixels.std)


def estimate_pixels(
    source: Source, images: int, limits: DecodeLimits, pixels: PixelFormat
) -> tuple[list[float], list[float]]:
    """Means and standard deviations of the channels, estimated by rank 0 from a sample."""
    found = None
    if collectives.rank() == 0:
        statistics = pixel_statistics(source, images, limits=limits, pixels=pixels)
        found = [statistics.mean, statistics.std]
    mean, std = collectives.broadcast_json(found)
    return mean, std


def seed_forward(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seed torch for one forward pass: dropout masks depend on nothing that came before it."""
    state = np.random.SeedSequence((seed, step, rank, micro_batch)).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device now; None if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def used_memory(device: torch.device) -> float:
    """Gigabytes (1e9 bytes): of a GPU the most that tensors held at once so far, otherwise what
    this process holds now; 0 where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def refuse_too_large(method: nn.Module, world: World, *, sharded: bool = False) -> None:
    """Refuse a method (built on meta) whose weights, gradients and momentum cannot fit.

    `sharded` ones are spread over the ranks.

    Raises:
        ValueError: with what is needed and what there is.
    """
    needed = 12 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    needed //= world.size if sharded else 1
    free = free_memory(world.device)
    if free is None:
        return
    if world.device.type != "cuda":
        free //= world.local_size
    if needed > free:
        raise ValueError(
            f"this model needs {needed / 1e9:.1f} GB for weights, gradients and momentum alone, "
            f"and {world.device} has {free / 1e9:.1f} GB free for each process: choose a smaller "
            + ("model=, or more processes" if sharded else "model=, strategy=fsdp or more memory")
        )
