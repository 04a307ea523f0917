"""Activation checkpointing: keep a block's input, compute the block again in the backward pass.

Chen et al. (2016), https://arxiv.org/abs/1604.06174. The repeated pass sees the same random numbers
and autocast state, and leaves BatchNorm's running statistics alone, so that losses, gradients and
buffers are those of a run without it. A synchronised BatchNorm repeats its collectives too, in the
same order on every rank.

Policies, from least memory to most:

    all          every block is repeated
    every_2      every second block, from the first; or every_3, ...
    selective    every block, but the results of its convolutions, matrix products, attention and
                 collectives are kept: what is repeated costs little, and no rank waits for another
    budget_0.5   chosen by torch.compile, operation by operation, for half of the memory; or any
                 share between 0 and 1. Only where the trunk is compiled.
    none         nothing is repeated
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from selfsight.distributed.batchnorm import frozen_running_statistics

Contexts = tuple[AbstractContextManager, AbstractContextManager]

_aten = torch.ops.aten
KEPT = {
    _aten.convolution.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
}
"""Operations whose results the policy `selective` keeps."""


class Checkpointed:
    """Mixed into the class of a block: its forward is repeated in the backward pass."""

    selective = False

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The block's own forward; without gradients it is called as it is."""
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        if torch.compiler.is_compiling():  # a compiled graph updates its buffers once by itself
            if self.selective:
                options["context_fn"] = _selective_contexts
        else:
            options["context_fn"] = self._contexts
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    def _contexts(self) -> Contexts:
        assert isinstance(self, nn.Module)
        first, again = _selective_contexts() if self.selective else (nullcontext(), nullcontext())
        return first, _both(frozen_running_statistics(self), again)


class Selective(Checkpointed):
    """The same, but what the operations in `KEPT` gave is not computed again."""

    selective = True


def checkpoint_activations(units: Sequence[nn.Module], policy: str = "all") -> None:
    """Make modules of `units` repeat their forward in the backward pass, in place.

    Parameter names, references and copies are untouched: only the class of the module changes, to
    one derived from its own. A unit inside another one would be computed three times.

    Args:
        units: the blocks of a trunk, in the order in which they run.
        policy: see the top of this file. `budget_...` is for `memory_budget`: nothing changes here.

    Raises:
        ValueError: there is no such policy, or a unit lies within another one.
    """
    every = _every(policy)
    inside = {id(child) for unit in units for child in unit.modules() if child is not unit}
    for number, unit in enumerate(units):
        if id(unit) in inside:
            raise ValueError(
                f"unit {number} ({type(unit).__name__}) lies within another one; name either the "
                "block or its parts for activation checkpointing."
            )
    mixin = Selective if policy == "selective" else Checkpointed
    for unit in units[:: every or 1] if every else ():
        if not isinstance(unit, Checkpointed):
            kind = type(unit)
            unit.__class__ = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def memory_budget(policy: str) -> float | None:
    """The share of activation memory that a policy `budget_...` allows; None for all others.

    Raises:
        ValueError: the share is none between 0 and 1.
    """
    if not policy.startswith("budget_"):
        return None
    try:
        share = float(policy.removeprefix("budget_"))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"activation_checkpointing={policy}: the budget must be from 0 to 1.")
    return share


def _every(policy: str) -> int:
    """Of so many blocks one is repeated; 0 for none.

    Raises:
        ValueError: there is no such policy.
    """
    if policy == "none" or memory_budget(policy) is not None:
        return 0
    if policy in ("all", "selective"):
        return 1
    number = policy.removeprefix("every_")
    if not policy.startswith("every_") or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"activation_checkpointing={policy} is not one of none, all, every_2 (or another "
            "number), selective, budget_0.5 (or another share)."
        )
    return int(number)


def _keep(context: Any, operation: Callable[..., Any], *_: Any, **__: Any) -> CheckpointPolicy:
    if operation in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = partial(create_selective_checkpoint_contexts, _keep)


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield
