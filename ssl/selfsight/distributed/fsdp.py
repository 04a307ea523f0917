"""FSDP2: each rank keeps a part of every weight, gradient and momentum, for what does not fit one.

Each unit of the trunk is one group, gathered before it runs and let go after; so is every other
module that the method calls (its trunk's remaining weights, its heads), which lets evaluation call
the trunk alone. Names are unchanged; values become `DTensor`s, sharded along their first dimension.

In half precision only the units' weights travel and compute as such: that is what autocast would
make of them, but for vectors (biases, normalisation), which autocast leaves in float32 and which
are rounded here. Stem, heads and prototypes stay float32 for autocast to treat.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward

from selfsight.distributed.env import World

# Methods beside `forward` by which a method, and its trunk, may be called.
FORWARDS = (
    "plan",
    "features",
    "forward_views",
    "tokens",
    "tokens_views",
    "intermediate",
    "attention",
)


def shard(
    method: nn.Module,
    units: Sequence[nn.Module],
    world: World,
    *,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard: bool = True,
) -> None:
    """Shard the parameters of `method` over all ranks, in place; they become those of rank 0.

    Args:
        method: what is trained, on its device.
        units: the blocks of its trunk.
        world: the place of this process; more than one rank.
        dtype: of the units' gathered weights; None for their own.
        reduce_dtype: in which gradients are added up over the ranks; None for the weights' own.
        reshard: let a unit's gathered weights go after its forward pass and gather them again for
            the backward pass; if not, they stay in between.
    """
    for parameter in method.parameters():
        parameter.data = parameter.data.contiguous()
        if not parameter.is_meta:
            dist.broadcast(parameter.data, 0)
    own = {parameter.dtype for parameter in method.parameters()}
    assert len(own) == 1, f"parameters of several dtypes: {own}"
    with unset_fake_temporarily():  # its table of ranks has values, also in a dry run
        mesh = init_device_mesh(world.device.type, (world.size,))
    half = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=reduce_dtype or own.pop(), cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(reduce_dtype=half.reduce_dtype, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=half, reshard_after_forward=reshard)
    wrapped = [m for m in callable_children(method) if any(True for _ in m.parameters())]
    for module in wrapped:
        if not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh, mp_policy=full, reshard_after_forward=True)
    fully_shard(method, mesh=mesh, mp_policy=full, reshard_after_forward=True)
    for module in (method, *wrapped):
        for name in FORWARDS:
            if hasattr(module, name):
                register_forward(module, name)
    _settle(method)


def callable_children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules right below `module` that have a forward; lists of modules have none."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from callable_children(child)
        else:
            yield child


def _settle(method: nn.Module) -> None:
    """Have FSDP2 see `method` as the root: it takes what is called first for it, which may be the
    trunk in an evaluation. This call computes nothing."""
    assert "forward" not in vars(method), "the method's forward is patched"
    method.forward = lambda: None
    try:
        method()
    finally:
        del method.forward
