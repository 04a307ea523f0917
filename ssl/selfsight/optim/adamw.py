"""AdamW (arXiv:1711.05101) as PyTorch has it, with all state made at construction.

A step is masked by `optimizer.found_inf`, as in `selfsight.optim.sgd`: where it is 1, weights, both
moments and the step count stay as they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from selfsight.distributed.shards import local


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) whose moments and step counts exist before the first step.

    Args:
        params: parameters, or groups of them (`selfsight.optim.groups`).
        lr: learning rate; the loop sets it in each group before each step.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: for groups that set none of their own; multiplied by the learning rate.

    Raises:
        ValueError: a rate that cannot be.
    """

    found_inf: Tensor  # set by the loop; there is no default, as GradScaler asks for none
    grad_scale: Tensor

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        beta1, beta2 = betas  # a configuration hands over its own kind of list
        super().__init__(
            params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state: zero moments and a zero step count a parameter."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; of a sharded one, this rank's part."""
        assert closure is None, "AdamW takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] for p in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
