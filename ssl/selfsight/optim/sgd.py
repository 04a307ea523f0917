"""SGD with momentum as PyTorch has it, with all state made at construction and a masked step.

`optimizer.found_inf`, a float tensor on the parameters' device, masks a step without a look from
the host: where it is 1, neither weights nor momentum change, whatever the gradients hold. That is
PyTorch's own protocol between GradScaler and its fused optimisers, which is why the fused kernels
are not optional here. A parameter without a gradient is left alone altogether: no decay and no
momentum, as SwAV's frozen prototypes need.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from selfsight.distributed.shards import local


class SGD(torch.optim.SGD):
    """torch.optim.SGD(fused=True) whose momentum exists before the first step.

    Args:
        params: parameters, or groups of them (`selfsight.optim.groups`).
        lr: learning rate; the loop sets it in each group before each step.
        momentum: weight of the past updates, more than 0 (the checkpoint holds a buffer for it).
        weight_decay: for groups that set none of their own.
        nesterov: look ahead along the momentum.

    Raises:
        ValueError: a momentum or rate that cannot be.
    """

    found_inf: Tensor  # set by the loop; there is no default, as GradScaler asks for none
    grad_scale: Tensor

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            fused=True,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its momentum: zeros, which the first step turns into gradients."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; of a sharded one, this rank's part."""
        assert closure is None, "SGD takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            sgd(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters],
                [local(self.state[p]["momentum_buffer"]) for p in parameters],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )
