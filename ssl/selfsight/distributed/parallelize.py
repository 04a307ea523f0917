"""One function that lays a method out over the ranks. It knows no model.

The order is fixed, since each step changes what the next one sees: BatchNorm groups, activation
checkpointing, compilation, then DDP or FSDP2.

What crosses the network in one step of m micro-batches, each of g crop sizes (passes through the
trunk), with P parameters, on W ranks (tests count it):

    DDP      one all-reduce a bucket of 25 MiB (the first of 1 MiB): 4 * P bytes; 2 * P with
             compress_gradients=bf16. Once a step.
    FSDP2    the weights of each unit and head, rows filled up to a multiple of W: 2 * g * m
             all-gathers, in each pass forward and again backward (half where they stay); of the
             rest of the trunk (g + 1) * m; m reduce-scatters of the gradients. Two all-reduces of
             8 and 16 bytes a tensor, for the norms of clipping and of LARS.
    SyncBN   two all-reduces a layer and pass, of 8 * (2 * channels + 1) bytes forward and
             8 * channels backward; one more forward where the layer is repeated.
"""

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from selfsight.distributed import compression, fsdp, syncbn
from selfsight.distributed.activation import checkpoint_activations, memory_budget
from selfsight.distributed.collectives import all_gather_json
from selfsight.distributed.compilation import compile_units as compile_modules
from selfsight.distributed.env import World

STRATEGIES = ("ddp", "fsdp")
SETTLING_PASSES = 3
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parallelize(
    method: nn.Module,
    *,
    units: Sequence[nn.Module],
    world: World,
    syncbn_group_size: int | None = None,
    activation_checkpointing: bool | str = False,
    compile_units: Sequence[nn.Module] = (),
    compile_backend: str = "inductor",
    strategy: str = "ddp",
    precision: str = "fp32",
    compress_gradients: str | None = None,
    reshard: bool = True,
) -> nn.Module:
    """Lay `method`, which is on its device already, out over the ranks of `world`.

    Every rank calls it at the same place, before the optimiser is made. Parameters become those of
    rank 0. Names in `unwrap(result).state_dict()` are those of `method`, and so is the object,
    changed in place.

    Args:
        method: what is trained; its forward gives the loss.
        units: the blocks of its trunk that activation checkpointing repeats and FSDP2 shards.
        world: the place of this process.
        syncbn_group_size: ranks that share BatchNorm's statistics (see `fitting_group_size`); None
            leaves each rank its own.
        activation_checkpointing: compute `units` again in the backward pass: False, True (all), or
            a policy of `activation.py`.
        compile_units: modules to compile, each as one graph a crop size; none for none. Under FSDP2
            it is `units` that are compiled.
        compile_backend: torch.compile's.
        strategy: `ddp`, each rank holds all; or `fsdp`, each rank holds a part (FSDP2).
        precision: fp32, bf16 or fp16: in which FSDP2 gathers the units' weights. The loop's
            autocast does the rest, and all of it for DDP.
        compress_gradients: `bf16`: gradients are added up over the ranks in bfloat16.
        reshard: FSDP2 lets a unit's weights go between its forward and its backward pass.

    Returns:
        The module to call: a DDP module, or `method` itself for FSDP2 and in a world of one.

    Raises:
        ValueError: the group size does not fit, a buffer differs between ranks, or what is asked
            for does not go together.
    """
    policy = _policy(activation_checkpointing)
    _refuse(strategy, precision, policy, bool(compile_units), world)
    sharded = strategy == "fsdp" and world.size > 1
    reduce_dtype = compression.dtype_of(compress_gradients)
    half = HALF.get(precision) if sharded else None
    if syncbn_group_size is not None or half:
        syncbn.convert(method, syncbn_group_size or 1, world, alone=half is not None)
    checkpoint_activations(units, policy)
    if compile_units:  # FSDP2 gathers weights unit by unit, between what can be one graph
        modules = units if sharded else compile_units
        compile_modules(modules, compile_backend, memory_budget(policy))
    if world.size == 1:
        return method
    _require_equal_buffers(method)
    if sharded:
        fsdp.shard(method, units, world, dtype=half, reduce_dtype=reduce_dtype, reshard=reshard)
        return method
    return _ddp(method, world, reduce_dtype)


def unwrap(module: nn.Module) -> nn.Module:
    """The method inside what `parallelize` returned."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: nn.Module, enabled: bool = True) -> AbstractContextManager:
    """A context for a micro-batch that is not the last of its step: gradients add up on this rank.

    Under FSDP2 they are added up over the ranks in every micro-batch all the same: to keep them
    until the last would take a whole gradient on each rank, which FSDP2 is there to avoid.

    Args:
        module: what `parallelize` returned.
        enabled: False for the last micro-batch, whose backward pass reduces the whole sum.
    """
    if enabled and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _policy(asked: bool | str) -> str:
    if isinstance(asked, str):
        return asked
    return "all" if asked else "none"


def _refuse(strategy: str, precision: str, policy: str, compiled: bool, world: World) -> None:
    """Refuse what cannot be, in a sentence."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy} is not one of {', '.join(STRATEGIES)}.")
    if precision not in ("fp32", *HALF):
        raise ValueError(f"precision={precision} is not one of fp32, {', '.join(HALF)}.")
    if memory_budget(policy) is not None and not compiled:
        raise ValueError(
            f"activation_checkpointing={policy} is torch.compile's choice: set compile=true, or "
            "use all, every_2 or selective."
        )
    if strategy == "fsdp" and world.device.type not in ("cpu", "cuda"):
        raise ValueError(f"strategy=fsdp runs on cpu and cuda, and not on {world.device.type}.")


def _ddp(
    method: nn.Module, world: World, reduce_dtype: torch.dtype | None
) -> DistributedDataParallel:
    # The strides of a 1x1 convolution's gradient may differ in name from its weight's, for the same
    # memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    lanes = [name for name, buffer in method.named_buffers() if isinstance(buffer, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, lanes)
    fake = any(isinstance(p, FakeTensor) for p in method.parameters())  # a dry run: no values
    module = DistributedDataParallel(
        method,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=not fake,
        init_sync=not fake,
    )
    module.broadcast_buffers = False  # they are equal now, and what changes them is synchronised
    if reduce_dtype:
        compression.compress(module, reduce_dtype)
    if not fake:
        _settle_buckets(module)
    return module


def _require_equal_buffers(method: nn.Module) -> None:
    """DDP makes parameters equal at its construction; a buffer that differs is a mistake."""
    mine = {
        name: [str(buffer.dtype), list(buffer.shape), _digest(buffer)]
        for name, buffer in method.named_buffers()
        # a DTensor is one thing on all ranks, and what is fake (a dry run) has no value
        if not isinstance(buffer, DTensor | FakeTensor)
    }
    if not mine:
        return
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
        for _ in range(SETTLING_PASSES):
            module().backward()
    finally:
        del method.forward
    for parameter in parameters:
        parameter.grad = None
