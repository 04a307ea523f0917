"""All that a run needs to go on: one object, written to and read from checkpoints.

Random state is not among it: the loop seeds every forward pass from (seed, step, micro-batch,
rank), and the stream seeds every sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from selfsight.distributed.checkpoint_parts import Reader, difference
from selfsight.methods.method import Method


class Stateful(Protocol):
    """Something with a small state of plain numbers, e.g. a plateau schedule or a loss scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class ForeignCheckpoint(ValueError):
    """The checkpoint belongs to another model or another configuration."""


@dataclass
class TrainState:
    """Step, weights, optimiser, position in the stream, and the small states beside them."""

    method: Method
    optimizer: torch.optim.Optimizer
    cursors: Tensor
    """int64 (batch_size, 3): the state of every lane of the stream, over all ranks."""
    small: Mapping[str, Stateful] = field(default_factory=dict)
    step: int = 0
    """Updates done."""
    skipped: int = 0
    """Updates left out because a number was not finite."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured once and is told again: k-NN at initialisation and since."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; they are not copied."""
        tensors = {f"method/{k}": v for k, v in self.method.state_dict().items()}
        return tensors | self._optimizer_tensors() | {"stream/cursors": self.cursors}

    def scalars(self) -> dict[str, Any]:
        """Everything else, as plain values."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "figures": self.figures,
            "small": {name: item.state_dict() for name, item in self.small.items()},
        }

    @torch.no_grad()
    def restore(self, reader: Reader, where: str) -> None:
        """Take over the state of a checkpoint, in place: what this rank holds of it.

        Raises:
            ForeignCheckpoint: names or shapes differ; nothing has been changed then.
        """
        own = self.tensors()
        if problem := difference({n: tuple(t.shape) for n, t in own.items()}, reader.shapes):
            raise ForeignCheckpoint(f"the checkpoint {where} is of another model: {problem}")
        for name, tensor in own.items():
            reader.fill(name, tensor)
        scalars = reader.manifest["scalars"]
        self.step, self.skipped = scalars["step"], scalars["skipped"]
        self.figures = dict(scalars["figures"])
        for name, item in self.small.items():
            item.load_state_dict(scalars["small"][name])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"optimizer/{name}/{key}": value
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
