"""RMSProp with momentum as in TensorFlow, by which EfficientNets and Visual Transformers were
trained: epsilon inside the root, the mean square begins at 1.

    s <- alpha s + (1 - alpha) g^2;  m <- momentum m + lr g / sqrt(s + eps);  w <- w - m

(Hinton's lecture 6e; Szegedy et al. 2016, arXiv:1512.00567, section 8.) Weight decay is added to
the gradient. A step is masked by `optimizer.found_inf`, as in `selfsight.optim.sgd`.
"""

# torch exports its foreach operations under private names only
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from selfsight.distributed.shards import local


class RMSprop(Optimizer):
    """RMSProp whose state exists before the first step.

    Args:
        params: parameters, or groups of them (`selfsight.optim.groups`).
        lr: learning rate; the loop sets it in each group before each step.
        alpha: weight of the past in the mean square.
        momentum: weight of the past updates.
        eps: added to the mean square.
        weight_decay: for groups that set none of their own.

    Raises:
        ValueError: a value that cannot be.
    """

    found_inf: Tensor  # set by the loop
    grad_scale: Tensor

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.0,
        alpha: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        if not (0 < alpha < 1 and 0 <= momentum < 1 and eps > 0):
            raise ValueError(
                f"RMSProp needs alpha in (0, 1), momentum in [0, 1) and eps above 0, not {alpha}, "
                f"{momentum} and {eps}"
            )
        defaults = {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state: mean squares of 1, no momentum."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "square": torch.ones_like(parameter),
                "velocity": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; of a sharded one, this rank's part."""
        assert closure is None, "RMSprop takes no closure"
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            own = [local(p) for p in parameters]
            gradients = [local(p.grad) for p in parameters]
            if bad is not None:
                # a number that is not finite times 0 would stay one
                gradients = [torch.where(bad > 0, 0.0, g) for g in gradients]
            if group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, own, alpha=group["weight_decay"]))
            squares = [local(self.state[p]["square"]) for p in parameters]
            velocities = [local(self.state[p]["velocity"]) for p in parameters]
            new_squares = torch._foreach_mul(squares, group["alpha"])
            torch._foreach_addcmul_(new_squares, gradients, gradients, 1 - group["alpha"])
            roots = torch._foreach_add(new_squares, group["eps"])
            torch._foreach_sqrt_(roots)
            new_velocities = torch._foreach_mul(velocities, group["momentum"])
            torch._foreach_addcdiv_(new_velocities, gradients, roots, group["lr"])
            if bad is not None:
                keep = bad > 0
                new_squares = [
                    torch.where(keep, a, b) for a, b in zip(squares, new_squares, strict=True)
                ]
                new_velocities = [
                    torch.where(keep, a, b) for a, b in zip(velocities, new_velocities, strict=True)
                ]
                torch._foreach_sub_(own, [torch.where(keep, 0.0, v) for v in new_velocities])
            else:
                torch._foreach_sub_(own, new_velocities)
            torch._foreach_copy_(squares, new_squares)
            torch._foreach_copy_(velocities, new_velocities)
