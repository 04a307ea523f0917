"""LARS: SGD whose step on each tensor is proportional to the tensor's norm.

Source: You et al. 2017 (arXiv:1708.03888), in the form of NVIDIA Apex's LARC with clipping off,
which SwAV and SEER used. For a weight p with gradient g:

    scale = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
    g     = (g + weight_decay * p) * scale

followed by SGD with momentum on g, the learning rate outside the momentum. Where |p| or |g| is
zero, g is used as it is, without weight decay. Nothing is excluded from decay or scaling: a bias
that starts at zero takes an unscaled first step, as in the original.

Differences from Apex: a few list operations instead of a Python loop with two reads of the device a
tensor; norms are of whole tensors where FSDP2 shards them, for one all-reduce of all of them; the
gradients are overwritten in place, so that no copy of weights, gradients or momentum
is made; and a step can be masked on the device (`selfsight.optim.sgd`). The rule of VISSL's
lars.py, which divides by |g + weight_decay * p|, is another one.
"""
# The foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from selfsight.distributed.shards import is_sharded, local, whole_norms
from selfsight.optim.sgd import SGD

# PyTorch adds a long float32 tensor's squares on CPU in too few partial sums: the norm of 40
# million elements is 0.3 % off, that of pieces of this many elements about 1e-6.
CPU_NORM_PIECE = 2**18


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms of tensors of one device and dtype, as one vector; never read by the host.

    Of a sharded tensor it is the norm of the whole, which all ranks must ask for together.
    """
    return whole_norms(_norms([local(tensor) for tensor in tensors]), tensors)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors)))
    pieces: list[Tensor] = []
    counts: list[int] = []
    for tensor in tensors:
        if tensor.numel() <= CPU_NORM_PIECE:
            pieces.append(tensor)
            counts.append(1)
        else:  # along the first dimension, which is the outermost in every memory format we use
            rows = max(1, CPU_NORM_PIECE * tensor.shape[0] // tensor.numel())
            parts = tensor.split(rows)
            pieces.extend(parts)
            counts.append(len(parts))
    partial = torch.stack(torch._foreach_norm(pieces))
    return torch.stack(torch._foreach_norm(partial.split(counts)))


class LARS(SGD):
    """Layer-wise adaptive rate scaling over SGD with momentum.

    `step()` overwrites the gradients by the updates it hands to the momentum. If `found_inf` is set
    (a float tensor), the step is masked where it is 1; if `grad_scale` is set, gradients are
    divided by it first. Both are the attributes that torch.amp.GradScaler sets.

    Args:
        params: parameters, or groups of them (`selfsight.optim.groups`); those of one group on one
            device and of one dtype.
        lr: learning rate; the loop sets it in each group before each step.
        momentum: weight of the past updates, more than 0.
        weight_decay: for groups that set none of their own.
        trust_coefficient: ratio of update to weight norm at a learning rate of 1.
        eps: added to the denominator of the scale.
        nesterov: look ahead along the momentum.

    Raises:
        ValueError: a value that cannot be, or a group that spans devices or dtypes.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        nesterov: bool = False,
    ) -> None:
        if trust_coefficient <= 0 or eps < 0:
            raise ValueError(
                "LARS needs a trust_coefficient above 0 and an eps of at least 0, "
                f"not {trust_coefficient} and {eps}"
            )
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        for group in self.param_groups:
            group.setdefault("trust_coefficient", trust_coefficient)
            group.setdefault("eps", eps)
            if len({(p.device, p.dtype) for p in group["params"]}) > 1:
                raise ValueError("the parameters of a LARS group must share one device and dtype")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient. No closure is supported."""
        assert closure is None, "LARS takes no closure"
        # GradScaler sets, multiplies and deletes these two, so they are no fields of the class.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        work = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                momenta = [self.state[p]["momentum_buffer"] for p in parameters]
                work.append((group, parameters, [p.grad for p in parameters], momenta))
        if grad_scale is not None:
            for _, _, gradients, _ in work:
                torch._foreach_mul_([local(g) for g in gradients], grad_scale.reciprocal())
        own = [
            _norms([local(tensor) for tensor in tensors])
            for _, parameters, gradients, _ in work
            for tensors in (parameters, gradients)
        ]
        if sharded := any(is_sharded(p) for _, parameters, _, _ in work for p in parameters):
            of = [t for _, parameters, gradients, _ in work for t in (*parameters, *gradients)]
            own = list(whole_norms(torch.cat(own), of).split([len(part) for part in own]))
        for (group, *lists), *both in zip(work, own[0::2], own[1::2], strict=True):
            if sharded:
                lists = [[local(tensor) for tensor in tensors] for tensors in lists]
            parameters, gradients, momenta = lists
            self._precondition(
                parameters,
                gradients,
                *both,
                weight_decay=group["weight_decay"],
                trust_coefficient=group["trust_coefficient"],
                eps=group["eps"],
            )
            sgd(
                parameters,
                gradients,
                list(momenta),
                fused=True,
                found_inf=found_inf,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )

    @staticmethod
    def _precondition(
        parameters: list[Tensor],
        gradients: list[Tensor],
        parameter_norms: Tensor,
        gradient_norms: Tensor,
        *,
        weight_decay: float,
        trust_coefficient: float,
        eps: float,
    ) -> None:
        scales = gradient_norms + weight_decay * parameter_norms + eps
        scales = trust_coefficient * parameter_norms / scales
        # The two exceptions need no case of their own below. A weight of norm zero adds nothing to
        # its gradient, which is kept by a scale of 1; a gradient of norm zero stays zero by one
        # of 0, whatever the decay has added to it.
        scales = scales.masked_fill_(gradient_norms == 0, 0.0)
        scales = scales.masked_fill_(parameter_norms == 0, 1.0)
        torch._foreach_add_(gradients, parameters, alpha=weight_decay)
        torch._foreach_mul_(gradients, scales.unbind())
