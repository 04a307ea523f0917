"""A world of many ranks of which only this one exists: collectives return at once and move nothing.

For rehearsals with tensors that have shapes and no values.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from selfsight.distributed.env import World

# Collectives by the names that PyTorch's dispatcher has for them.
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
NAMESPACES = ("c10d", "_c10d_functional")


@contextmanager
def rehearsed_world(ranks: int, per_node: int) -> Iterator[World]:
    """The world of rank 0 of `ranks`, on nodes of `per_node`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, 0, min(per_node, ranks), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def hand_over_buckets(model: nn.Module) -> None:
    """What DDP would reduce after a backward pass, by the sizes of its buckets: its own code reads
    values, which gradients have none of here."""
    if isinstance(model, DistributedDataParallel):
        for bucket in model.reducer._get_zeros_like_grad_buckets():
            dist.all_reduce(bucket.buffer())
