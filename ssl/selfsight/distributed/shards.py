"""Tensors of which each rank holds a part: the weights, gradients and momentum of FSDP2.

An optimiser works on the parts as on any tensor; only what spans a whole tensor, such as its norm,
is added up over the ranks. With more ranks than rows some parts are empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfsight.distributed import collectives


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of `tensor`."""
    return isinstance(tensor, DTensor)


def whole_norms(own: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Norms of whole tensors, from those of this rank's parts: one all-reduce for all of them.

    Args:
        own: (n) Euclidean norms of `local(tensor)`.
        tensors: the n tensors; those that are not sharded keep their norm.

    Returns:
        (n) norms, equal on all ranks, and `own` itself where nothing is sharded. Never read by the
        host.
    """
    sharded = [index for index, tensor in enumerate(tensors) if isinstance(tensor, DTensor)]
    if not sharded:
        return own
    groups = {tensor.device_mesh.get_group() for tensor in tensors if isinstance(tensor, DTensor)}
    assert len(groups) == 1, "tensors are sharded over different groups of ranks"
    if len(sharded) == len(tensors):
        squares = collectives.all_reduce_sum(own.double().square_(), groups.pop())
        return squares.sqrt_().to(own.dtype)
    parts = list(own.unbind())
    squares = torch.stack([parts[index] for index in sharded]).double().square_()
    total = collectives.all_reduce_sum(squares, groups.pop()).sqrt_().to(own.dtype)
    for index, norm in zip(sharded, total.unbind(), strict=True):
        parts[index] = norm
    return torch.stack(parts)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor as it is. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors: a collective that all ranks call.

    Sharded tensors are put together one at a time and kept in host memory, on rank 0 alone: the
    other ranks get an empty one in their place.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            tensor = full.cpu() if collectives.rank() == 0 else full.new_empty(0, device="cpu")
        found[name] = tensor
    return found
