"""Gradients cross the network in bfloat16: half the bytes, and eight bits of each number.

Weights, gradients and their sums stay float32 on each rank; only what DDP's all-reduce carries is
rounded. Each rank divides by the number of ranks first, so that a sum cannot leave the range that
bfloat16 shares with float32.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

COMPRESSIONS = {"bf16": torch.bfloat16}


def dtype_of(compress_gradients: str | None) -> torch.dtype | None:
    """The dtype in which gradients travel; None for their own.

    Raises:
        ValueError: there is no such compression.
    """
    if compress_gradients is None:
        return None
    if compress_gradients not in COMPRESSIONS:
        raise ValueError(
            f"compress_gradients={compress_gradients} is not one of {', '.join(COMPRESSIONS)}, null"
        )
    return COMPRESSIONS[compress_gradients]


def compress(module: DistributedDataParallel, dtype: torch.dtype) -> None:
    """Have `module` exchange its gradients in `dtype`, from the next backward pass on."""

    def reduce(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        small = buffer.to(dtype).div_(dist.get_world_size())
        work = dist.all_reduce(small, async_op=True)
        assert work is not None

        def back(future: torch.futures.Future[Any]) -> Tensor:
            return buffer.copy_(future.value()[0])

        return work.get_future().then(back)

    module.register_comm_hook(None, reduce)
