"""Exchanges between ranks, as plain functions that are identities in a world of one.

None of them takes part in autograd, and none waits for the device except where it says so. Values
that are not tensors travel as JSON in a byte tensor: nothing is ever unpickled.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def rank() -> int:
    """Index of this process in the world; 0 in a world of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size(group: Group | None = None) -> int:
    """Number of processes in `group` (None: the world)."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The sum of `tensor` over the ranks: any shape, equal on all. The argument is not changed.

    In a world of one the argument itself is returned.
    """
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The elementwise maximum of `tensor` over the ranks; otherwise as `all_reduce_sum`."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


@torch.no_grad()
def all_gather_rows(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The tensors (n, ...) of all ranks, joined to (size * n, ...) in the order of ranks.

    The shape must be the same on every rank: see `all_gather_ragged_rows` for the other case. In a
    world of one the argument itself is returned.
    """
    ranks = size(group)
    if ranks == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    rows = tensor.new_empty((ranks * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(rows, tensor, group=group)
    return rows


@torch.no_grad()
def all_gather_ragged_rows(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The tensors (n_r, ...) of all ranks, joined to (sum of n_r, ...) in the order of ranks.

    The number of rows may differ, and may be 0. It waits for the device: not for the hot path.
    """
    if size(group) == 1:
        return tensor
    counts: list[int] = all_gather_json(tensor.shape[0], group)
    most = max(counts)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    blocks = all_gather_rows(padded, group).split(most) if most else [padded] * len(counts)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


@torch.no_grad()
def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """The tensor of rank `src`, on every rank: same shape and dtype. The argument is not changed.

    In a world of one the argument itself is returned.
    """
    if size() == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(result, src)
    return result


def broadcast_json(value: Any, src: int = 0) -> Any:
    """The JSON value of rank `src`, on every rank; the argument of the other ranks is ignored.

    It comes back as JSON gives it back: tuples as lists, keys as strings.
    """
    if size() == 1:
        return json.loads(json.dumps(value))
    data = _encode(value) if rank() == src else torch.empty(0, dtype=torch.uint8)
    length = broadcast(torch.tensor([data.numel()]), src)
    if rank() != src:
        data = torch.empty(int(length), dtype=torch.uint8)
    return _decode(broadcast(data, src))


def all_gather_json(value: Any, group: Group | None = None) -> list[Any]:
    """The JSON values of all ranks, in the order of ranks, on every rank."""
    if size(group) == 1:
        return [json.loads(json.dumps(value))]
    data = _encode(value)
    lengths = all_gather_rows(torch.tensor([data.numel()]), group).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: data.numel()] = data
    blocks = all_gather_rows(padded, group).split(max(lengths))
    return [_decode(block[:length]) for block, length in zip(blocks, lengths, strict=True)]


def first_json(key: str, make: Callable[[], Any]) -> Any:
    """The JSON value that the first rank to ask for `key` made; the others wait for it.

    Not a collective: ranks may ask at different times, or not at all. A key is made once.
    """
    if size() == 1:
        return json.loads(json.dumps(make()))
    store = dist.distributed_c10d._get_default_store()
    if store.add(f"{key}/claimed", 1) == 1:
        value = make()
        store.set(key, json.dumps(value))
    return json.loads(store.get(key))


def barrier(group: Group | None = None) -> None:
    """Wait until every rank is here."""
    if size(group) > 1:
        dist.barrier(group)


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: Group | None) -> Tensor:
    if size(group) == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation, group)
    return result


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
