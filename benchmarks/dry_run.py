"""One update of the SEER recipe as one rank of 512, without memory, network or values.

    python benchmarks/dry_run.py [--strategy fsdp] [--model MODEL] [--ranks 512] [--out FILE]

The method, its layout over the ranks, the loss, the backward pass and LARS are those of a run; the
tensors are fake (shapes only) and so is the network. Printed are the bytes that are alive at once
on a rank (weights, gradients, momentum, and the peak with activations), and what one rank hands to
each kind of collective. Not counted: what the allocator, cuDNN and NCCL need for themselves.
"""

import argparse
import json
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfsight.build import build, compose
from selfsight.config import check
from selfsight.data.batch import Batch
from selfsight.distributed.env import World
from selfsight.distributed.parallelize import no_sync, parallelize
from selfsight.distributed.shards import local
from selfsight.methods.method import Now
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.runtime import autocast_factory, shares

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Meter(TorchDispatchMode):
    """Bytes of all storage alive, their peak, and what is handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._seen: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = COLLECTIVES.get(func._schema.name.rpartition("::")[2])
        if kind and func.namespace in ("c10d", "_c10d_functional"):
            self.calls[kind] += 1
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.bytes[kind] += max(t.numel() * t.element_size() for t in tensors)
        result = func(*args, **(kwargs or {}))
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


def dry_run(overrides: list[str], ranks: int, per_node: int, strategy: str) -> dict[str, Any]:
    """Figures of one update of `overrides` as rank 0 of `ranks`."""
    config = check(compose("pretrain", overrides))
    images, parts = shares(config.batch_size, config.images_per_device, ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world = World(0, ranks, 0, per_node, torch.device("cpu"))
    meter = Meter()
    start = time.perf_counter()
    try:
        with FakeTensorMode(), meter:
            method = build(config.method)
            model = parallelize(
                method,
                units=method.units(),
                world=world,
                syncbn_group_size=config.sync_batchnorm_group or ranks,
                activation_checkpointing=config.activation_checkpointing,
                strategy=strategy,
                precision=config.precision,
            )
            optimizer = build(config.optim.optimizer)(
                parameter_groups(
                    method.named_parameters(),
                    weight_decay=config.optim.weight_decay,
                    exclude_bias_and_norm=config.optim.exclude_bias_and_norm,
                )
            )
            parameters = list(method.parameters())
            weights = sum(_bytes(p) for p in parameters)
            momenta = sum(_bytes(v) for s in optimizer.state.values() for v in s.values())
            views = [
                torch.empty(g.count, images // parts, 3, g.size, g.size, dtype=torch.uint8)
                for g in config.views.values()
            ]
            empty = torch.empty(images // parts, dtype=torch.int64)
            batch = Batch(views, empty, empty)
            now = Now(config.method.freeze_prototypes_steps, config.steps)
            meter.calls.clear()
            meter.bytes.clear()
            # DDP's own code reads the gradients' values after its first pass, which these have not;
            # its buckets are asked for their sizes, and handed over here
            with no_sync(model), autocast_factory(world.device, config.precision)():
                loss, _ = model(batch, now, None)
            with no_sync(model):
                loss.backward()
            gradients = sum(_bytes(p.grad) for p in parameters if p.grad is not None)
            if isinstance(model, DistributedDataParallel):
                for bucket in model.reducer._get_zeros_like_grad_buckets():
                    dist.all_reduce(bucket.buffer())
            gradient_norm(optimizer)
            set_hyperparameters(optimizer, lr=0.1, weight_decay=config.optim.weight_decay)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(now, ok=torch.ones((), dtype=torch.bool))
        with unset_fake_temporarily():
            return {
                "command": "python launch/pretrain.py " + " ".join(overrides),
                "ranks": ranks,
                "strategy": strategy,
                "parameters": sum(p.numel() for p in parameters),
                "images_per_rank": images,
                "gigabytes_per_rank": {
                    "weights": weights / 1e9,
                    "gradients": gradients / 1e9,
                    "momentum": momenta / 1e9,
                    "peak": meter.peak / 1e9,
                },
                "collectives": dict(meter.calls),
                "gigabytes_handed_over": {k: v / 1e9 for k, v in meter.bytes.items()},
                "seconds": round(time.perf_counter() - start, 1),
            }
    finally:
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="regnety_256gf")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    parser.add_argument("overrides", nargs="*", help="more of pretrain's key=value")
    arguments = parser.parse_args()
    overrides = [f"model={arguments.model}", "data=synthetic", "device=cpu"]
    found = dry_run(
        [*overrides, *arguments.overrides],
        arguments.ranks,
        arguments.per_node,
        arguments.strategy,
    )
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
