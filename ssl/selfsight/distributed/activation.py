"""Activation checkpointing: keep a block's input, compute the block again in the backward pass.

Chen et al. (2016), https://arxiv.org/abs/1604.06174. The repeated pass sees the same random numbers
and autocast state, and leaves BatchNorm's running statistics alone, so that losses, gradients and
buffers are those of a run without it. A synchronised BatchNorm repeats its collectives too, in the
same order on every rank.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from selfsight.distributed.batchnorm import frozen_running_statistics


class Checkpointed:
    """Mixed into the class of a block: its forward is repeated in the backward pass."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The block's own forward; without gradients it is called as it is."""
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=self._contexts, **options
        )

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        assert isinstance(self, nn.Module)
        return nullcontext(), frozen_running_statistics(self)


def checkpoint_activations(units: Sequence[nn.Module]) -> None:
    """Make each module of `units` repeat its forward in the backward pass, in place.

    Parameter names, references and copies are untouched: only the class of the module changes, to
    one derived from its own. A unit inside another one would be computed three times.

    Raises:
        ValueError: a unit lies within another one.
    """
    inside = {id(child) for unit in units for child in unit.modules() if child is not unit}
    for number, unit in enumerate(units):
        if id(unit) in inside:
            raise ValueError(
                f"unit {number} ({type(unit).__name__}) lies within another one; name either the "
                "block or its parts for activation checkpointing."
            )
    for unit in units:
        if not isinstance(unit, Checkpointed):
            kind = type(unit)
            unit.__class__ = type(f"Checkpointed{kind.__name__}", (Checkpointed, kind), {})
