"""Counts bytes and multiply-adds of whatever runs inside, with real tensors or with fake ones."""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfsight.distributed.rehearsed import COLLECTIVES, NAMESPACES
from selfsight.distributed.shards import local


class Meter(TorchDispatchMode):
    """Bytes of all storage alive and their peak, multiply-adds, and what collectives get.

    Multiply-adds are those of convolutions, matrix products and attention, forward and backward,
    with what is computed again under activation checkpointing. PyTorch's own counter is not used:
    of the backward pass of grouped convolutions it counts too much.

    Attributes:
        alive, peak: bytes.
        macs: multiply-adds, by `forward` and `backward` operations.
        calls, bytes: of collectives, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.macs: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._seen: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        kind = COLLECTIVES.get(name)
        if kind and func.namespace in NAMESPACES:
            self.calls[kind] += 1
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.bytes[kind] += max(t.numel() * t.element_size() for t in tensors)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self._work(name, args, result)
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self.see(item)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is gone."""
        storage = local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            size -= self._seen[key][1]  # FSDP2 gives and takes memory of one storage
            reference = self._seen[key][0]
        else:
            reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self._seen[key] = (reference, storage.nbytes())
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        self.alive -= self._seen.pop(key)[1]

    def _work(self, name: str, args: Sequence[Any], result: Any) -> None:
        if name in ("mm", "bmm"):
            self.macs["products"] += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.macs["products"] += args[1].numel() * args[2].shape[-1]
        elif name in ("convolution", "_convolution"):
            self.macs["convolutions"] += result.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            once = args[0].numel() * args[2][0].numel()
            self.macs["convolutions"] += once * sum(map(bool, args[10][:2]))
        elif name.startswith("_scaled_dot_product") and "attention" in name:
            self._attention(name, args)

    def _attention(self, name: str, args: Sequence[Any]) -> None:
        """Queries times keys and scores times values; backward these two and the gradients of
        both, of which the scores are computed once more."""
        backward = name.endswith("backward")
        query, key, value = args[1:4] if backward else args[:3]
        once = query.numel() * key.shape[-2]
        second = query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        self.macs["attention"] += once * 3 + second * 2 if backward else once + second
