"""torch.compile of a trunk: each named module becomes one graph for every crop size.

Only training passes are compiled. Evaluation, with its own batch sizes, runs as it is written.
Names in `state_dict()`, references and copies are untouched: only the class of a module changes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

# Graphs of one module: a crop size each, with and without gradient, and a last micro-batch. Modules
# of one class share a list of graphs, and may all differ in shape, or in a chance of being dropped.
# torch gives up, silently, after 8 in a list.
GRAPHS = 8


class Compiled:
    """Mixed into the class of a module: its forward in training mode is a compiled graph."""

    graph: Callable[..., Any]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's forward, compiled in training mode."""
        assert isinstance(self, nn.Module)
        if self.training and not torch.compiler.is_compiling():
            return type(self).graph(self, *inputs, **options)
        return super().forward(*inputs, **options)  # type: ignore[misc]


def compile_units(
    units: Sequence[nn.Module], backend: str = "inductor", budget: float | None = None
) -> None:
    """Compile the forward of each module of `units`, in place, when it is first called.

    Modules of one class share their graphs where nothing else differs between them.

    Args:
        units: what `compile_units()` of a trunk gives.
        backend: torch.compile's; `inductor` needs a C++ compiler on CPU.
        budget: the share of the activations' memory that the graphs may keep for the backward pass,
            from 0 (repeat all) to 1; None for all of it. It holds for the whole process.
    """
    config = torch._dynamo.config
    most = GRAPHS * len(units)
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * most)
    if budget is not None:
        functorch_config.activation_memory_budget = budget
    kinds: dict[type, type] = {}
    for unit in units:
        if isinstance(unit, Compiled):
            continue
        kind = type(unit)
        if kind not in kinds:
            graph = torch.compile(kind.forward, dynamic=False, backend=backend)
            kinds[kind] = type(
                f"Compiled{kind.__name__}", (Compiled, kind), {"graph": staticmethod(graph)}
            )
        unit.__class__ = kinds[kind]
