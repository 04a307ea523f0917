"""What every BatchNorm of a model needs beyond its own forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm in training mode normalises by the batch and keeps nothing of it.

    Running statistics are as before when it ends. For a pass that another one repeats on the same
    images: the first pass of whole-batch assignments, or recomputation of a checkpointed block.
    """
    # The layers update copies that are thrown away. To say `track_running_stats = False` is not the
    # same: torch then saves fewer tensors for the backward pass, which checkpointing refuses.
    kept = []
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for name in STATISTICS:
                buffer = layer._buffers.get(name)
                if buffer is not None:
                    kept.append((layer, name, buffer))
                    layer._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for layer, name, buffer in kept:
            layer._buffers[name] = buffer


class KeptStatistics:
    """Undoes what a forward pass did to BatchNorm's running statistics, where its update is not
    made: one loss that is not finite would spoil them for good. Decided on the device."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            buffer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm)
            for buffer in layer.buffers(recurse=False)
        ]
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the statistics as they are."""
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore_where(self, bad: torch.Tensor) -> None:
        """Put them back if `bad`, a scalar on their device, is not 0."""
        chosen = bad > 0
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            torch.where(chosen, kept, buffer, out=buffer)
