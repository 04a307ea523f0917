"""One function that lays a method out over the ranks. It knows no model.

The order is fixed, since each step changes what the next one sees: BatchNorm groups, activation
checkpointing, compilation, then DDP or FSDP2. Compilation and FSDP2 are not built yet; they belong
at the places named here.
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selfsight.distributed import syncbn
from selfsight.distributed.activation import checkpoint_activations
from selfsight.distributed.collectives import all_gather_json
from selfsight.distributed.env import World


def parallelize(
    method: nn.Module,
    *,
    units: Sequence[nn.Module],
    world: World,
    syncbn_group_size: int | None = None,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Lay `method`, which is on its device already, out over the ranks of `world`.

    Every rank calls it at the same place. Parameters become those of rank 0. Names in
    `unwrap(result).state_dict()` are those of `method`, and so is the object, changed in place.

    Args:
        method: what is trained; its forward gives the loss.
        units: the blocks of its trunk that activation checkpointing repeats.
        world: the place of this process.
        syncbn_group_size: ranks that share BatchNorm's statistics (see `fitting_group_size`); None
            leaves each rank its own.
        activation_checkpointing: compute `units` again in the backward pass.

    Returns:
        The module to call: `method` itself in a world of one.

    Raises:
        ValueError: the group size does not fit, or a buffer differs between ranks.
    """
    if syncbn_group_size is not None:
        syncbn.convert(method, syncbn_group_size, world)
    if activation_checkpointing:
        checkpoint_activations(units)
    if world.size == 1:
        return method
    _require_equal_buffers(method)
    module = DistributedDataParallel(
        method,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    module.broadcast_buffers = False  # they are equal now, and what changes them is synchronised
    _settle_buckets(module)
    return module


def unwrap(module: nn.Module) -> nn.Module:
    """The method inside what `parallelize` returned."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: nn.Module, enabled: bool = True) -> AbstractContextManager:
    """A context for a micro-batch that is not the last of its step: gradients add up on this rank.

    Args:
        module: what `parallelize` returned.
        enabled: False for the last micro-batch, whose backward pass reduces the whole sum.
    """
    if enabled and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _require_equal_buffers(method: nn.Module) -> None:
    """DDP makes parameters equal at its construction; a buffer that differs is a mistake."""
    mine = {
        name: [str(buffer.dtype), list(buffer.shape), _digest(buffer)]
        for name, buffer in method.named_buffers()
    }
    for rank, theirs in enumerate(all_gather_json(mine)):
        different = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if different:
            raise ValueError(
                f"buffer {different[0]} of rank {rank} differs from this rank's at the start; give "
                "every rank the same seed and configuration."
            )


def _digest(buffer: torch.Tensor) -> str:
    data = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _settle_buckets(module: DistributedDataParallel) -> None:
    """Have DDP lay out its gradient buckets for good, before the first step.

    It does so after its first backward pass, by the order in which gradients came. With more than
    two ranks a gradient's place in a bucket decides in which order the ranks' shares are added, so
    the first step of a resumed run would differ in the last bit from the same step of a run that
    was never interrupted (tried: gloo, 3 and 4 ranks). This backward pass of zeros comes first
    instead; its order is that of the registration of parameters, reversed, as in most networks.
    """
    method = module.module
    parameters = [p for p in method.parameters() if p.requires_grad]
    assert "forward" not in vars(method), "the method's forward is patched"
    method.forward = lambda: torch.stack([p.sum().double() for p in parameters]).sum() * 0
    try:
        module().backward()
    finally:
        del method.forward
    for parameter in parameters:
        parameter.grad = None
