"""One update of a run as one rank of many, without memory, network or values.

The method, its layout over the ranks, the loss, the backward pass and the optimiser are those of
the run; the tensors have shapes only, and so has the network. What the allocator, cuDNN and NCCL
need for themselves is not counted.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selfsight.build import build
from selfsight.data.batch import Batch
from selfsight.distributed.parallelize import no_sync, parallelize
from selfsight.distributed.rehearsed import hand_over_buckets, rehearsed_world
from selfsight.distributed.shards import local
from selfsight.methods.method import Method, Now
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import parameter_groups, set_hyperparameters
from selfsight.planning.meter import Meter
from selfsight.runtime import autocast_factory, shares

LATER = 10**7  # a step at which nothing is frozen any more, and the queue is in use


@dataclass
class Rehearsal:
    """What one update needs on one rank. Bytes, and multiply-adds.

    Attributes:
        images, parts: of this rank in one update, and the micro-batches they go through in.
        parameters: trained and not, by part of the method.
        buffers: bytes of buffers by part (a queue, statistics), all of this rank.
        peak: most bytes alive at once.
        macs: multiply-adds of the whole update of this rank, by kind.
        calls, traffic: of collectives, by kind; bytes that this rank hands over.
    """

    ranks: int
    images: int
    parts: int
    parameters: dict[str, int] = field(default_factory=dict)
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    macs: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def states(self) -> int:
        """Bytes that lie there between updates: weights, buffers, the optimiser's state."""
        return self.weights + self.optimizer + sum(self.buffers.values())

    @property
    def activations(self) -> int:
        """Bytes beyond those and the gradients at the peak: what the backward pass keeps, and what
        is in work."""
        return max(0, self.peak - self.states - self.gradients)

    @property
    def macs_per_image(self) -> float:
        """Of a whole step: forward, backward, and what is computed twice."""
        return sum(self.macs.values()) / self.images


def rehearse(
    config: DictConfig,
    ranks: int,
    per_node: int,
    *,
    images: int | None = None,
    activation_checkpointing: Any = None,
    strategy: str | None = None,
) -> Rehearsal:
    """Rehearse one update of a checked configuration as rank 0 of `ranks`.

    Args:
        images: of one pass of this rank instead of those of the configuration; one micro-batch.
        activation_checkpointing, strategy: in place of the configuration's.

    Raises:
        ValueError: the batch does not divide over the ranks.
    """
    if images is None:
        own, parts = shares(config.batch_size, config.images_per_device, ranks)
    else:
        own, parts = images, 1
    checkpointing = config.activation_checkpointing
    if activation_checkpointing is not None:
        checkpointing = activation_checkpointing
    meter, start = Meter(), time.perf_counter()
    found = Rehearsal(ranks, own, parts)
    with torch.device("meta"):  # initialising looks at values
        method: Method = build(config.method)
    with rehearsed_world(ranks, per_node) as world, FakeTensorMode(), meter:
        method._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        model = parallelize(
            method,
            units=method.trunk.units(),
            world=world,
            syncbn_group_size=config.sync_batchnorm_group or ranks,
            activation_checkpointing=checkpointing,
            strategy=strategy or config.strategy,
            precision=config.precision,
            compress_gradients=config.compress_gradients,
        )
        optimizer = build(config.optim.optimizer)(
            parameter_groups(
                method.named_parameters(),
                weight_decay=config.optim.weight_decay,
                exclude_bias_and_norm=config.optim.exclude_bias_and_norm,
            )
        )
        _count(found, method, optimizer)
        micro = own // parts
        meter.peak = meter.alive
        _update(config, method, model, optimizer, meter, found, micro)
    found.peak = meter.peak
    found.macs = {kind: count * parts for kind, count in meter.macs.items()}
    found.calls, found.traffic = dict(meter.calls), dict(meter.bytes)
    found.seconds = time.perf_counter() - start
    return found


def _count(found: Rehearsal, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in method.named_parameters():
        part = name.partition(".")[0]
        found.parameters[part] = found.parameters.get(part, 0) + parameter.numel()
        found.weights += size(parameter)
        found.trained += parameter.numel() * parameter.requires_grad
    for name, buffer in method.named_buffers():
        part = name.partition(".")[0]
        found.buffers[part] = found.buffers.get(part, 0) + size(buffer)
    states: Mapping[Any, Mapping[str, Any]] = optimizer.state
    found.optimizer = sum(
        size(value)
        for state in states.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


def _update(
    config: DictConfig,
    method: Method,
    model: nn.Module,
    optimizer: Any,
    meter: Meter,
    found: Rehearsal,
    micro: int,
) -> None:
    """One pass of `micro` images and the update after it."""
    dtype = torch.uint8 if config.pixels.bits == 8 else torch.uint16
    channels = config.pixels.channels
    views = [
        torch.empty(g["count"], micro, channels, g["size"], g["size"], dtype=dtype)
        for g in config.views.values()
    ]
    empty = torch.empty(micro, dtype=torch.int64)
    batch = Batch(views, empty, empty)
    values = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.99, "teacher_temperature": 0.04}
    now = Now(LATER, 2 * LATER, values)
    meter.calls.clear()
    meter.bytes.clear()
    meter.macs.clear()
    # DDP's own code reads the gradients' values after its first pass, which these have not
    with no_sync(model), autocast_factory(torch.device("cpu"), config.precision)():
        loss, _ = model(batch, now, None)
    with no_sync(model):
        loss.backward()
    del loss
    parameters = list(method.parameters())
    found.gradients = sum(size(p.grad) for p in parameters if p.grad is not None)
    hand_over_buckets(model)
    method.after_backward(now)
    gradient_norm(optimizer)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.0)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(now, ok=torch.ones((), dtype=torch.bool))


def size(tensor: Tensor) -> int:
    """Bytes of this rank's part of a tensor."""
    part = local(tensor)
    return part.numel() * part.element_size()
