"""The norm of all gradients together, and clipping: by it, or each gradient by its own."""

# torch exports its foreach operations under private names only
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor
from torch.optim import Optimizer

from selfsight.distributed.shards import local
from selfsight.optim.lars import norms


@torch.no_grad()
def gradient_norm(
    optimizer: Optimizer, *, clip: float | None = None, per_tensor: bool = False
) -> Tensor:
    """Euclidean norm of all gradients, a scalar on their device; not finite if one of them is not.

    Under FSDP2 it is that of the whole gradients, by one all-reduce: all ranks call it.

    Args:
        optimizer: Whose parameters' gradients; parameters without one are left out.
        clip: Largest norm: gradients beyond are scaled down to it, in place.
        per_tensor: It is the largest norm of each gradient by itself, as in DINO's released code,
            and not of all together. What is returned is the norm of all before clipping.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    each = norms(gradients)
    norm = torch.linalg.vector_norm(each)
    if clip is not None:
        gradients = [local(gradient) for gradient in gradients]
        if per_tensor:
            torch._foreach_mul_(gradients, (clip / (each + 1e-6)).clamp_(max=1.0).unbind())
        else:
            torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm
