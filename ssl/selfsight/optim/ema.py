"""Exponential moving average of weights: the teacher of a student (Tarvainen and Valpola 2017,
"Mean teachers are better role models", arXiv:1703.01780; DINO, arXiv:2104.14294)."""

# torch exports its foreach operations under private names only
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor, nn

from selfsight.distributed.shards import local

CHUNK = 64  # tensors whose differences are held at a time


@torch.no_grad()
def move_average(average: nn.Module, source: nn.Module, momentum: float, ok: Tensor) -> None:
    """Move the parameters of `average` towards those of `source`: a += (1 - momentum) * (s - a).

    Buffers stay as they are: DINO's teacher keeps the batch statistics of its own forward passes.
    Written as a difference it does not move an average that equals its source, and is exact where
    1 - momentum is small. Of sharded parameters each rank moves its part.

    Args:
        average: a module of the same structure as `source`.
        source: what is averaged.
        momentum: share that the average keeps.
        ok: a boolean scalar on their device; where false nothing moves. It is not read by the host.
    """
    averages = [local(p) for p in average.parameters()]
    sources = [local(p) for p in source.parameters()]
    assert len(averages) == len(sources)
    rate = torch.where(ok, 1 - momentum, 0.0)
    for start in range(0, len(averages), CHUNK):
        own = averages[start : start + CHUNK]
        steps = torch._foreach_sub(sources[start : start + CHUNK], own)
        torch._foreach_mul_(steps, rate)
        torch._foreach_add_(own, steps)
