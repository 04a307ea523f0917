"""Many linear classifiers trained at once on the same features, by plain SGD in closed form.

Softmax regression has a gradient that can be written down, X' (softmax(XW) - Y) / b, so heads of
different learning rates are one stack of weights and an update is a few matrix products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Standardizer:
    """Scales features to mean 0 and deviation 1, as a BatchNorm before the head would."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Standardizer":
        std, mean = torch.std_mean(features.double(), dim=0, correction=0)
        # a channel that never changes stays at 0
        return cls(mean.float(), torch.where(std > 1e-6, std, torch.inf).float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features.device)) / self.std.to(features.device)


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    rates: Sequence[float],
    steps: int,
    batch_size: int,
    schedule: Callable[[int], float] | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train one head per learning rate, from zero, on the same batches.

    Args:
        features: (n, d) fp32.
        labels: (n,) integers.
        rates: H peak learning rates.
        schedule: factor of the rates at a step; None: half a cosine from 1 to 0.
        generator: draws the batches, passes over all images without repeats.

    Returns:
        weights (H, d, classes) and biases (H, classes).
    """
    n, d = features.shape
    device, heads = features.device, len(rates)
    lr = torch.tensor(rates, device=device).repeat_interleave(classes)
    # all heads side by side, so that an update is two matrix products; the last row is the bias
    weight = torch.zeros(d + 1, heads * classes, device=device)
    velocity = torch.zeros_like(weight)
    batch_size = min(batch_size, n)
    schedule = schedule or (lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    order, place = torch.randperm(n, generator=generator), 0
    columns = torch.arange(heads, device=device) * classes
    for step in range(steps):
        if place + batch_size > n:
            order, place = torch.randperm(n, generator=generator), 0
        rows = order[place : place + batch_size].to(device)
        place += batch_size
        x, y = features[rows], labels[rows]
        x = torch.cat([x, torch.ones(len(x), 1, device=device)], 1)
        error = (x @ weight).view(len(x), heads, classes).softmax(-1).flatten(1)
        error.scatter_add_(1, y[:, None] + columns, error.new_full((len(x), heads), -1.0))
        gradient = (x.T @ error).div_(len(x))
        if weight_decay:
            gradient[:-1].add_(weight[:-1], alpha=weight_decay)
        velocity.mul_(momentum).add_(gradient)
        update = gradient.add_(velocity, alpha=momentum) if nesterov else velocity
        weight.addcmul_(update, lr, value=-schedule(step))
    found = weight.view(d + 1, heads, classes).transpose(0, 1)
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


@torch.no_grad()
def predict_heads(features: Tensor, weight: Tensor, bias: Tensor, block: int = 8192) -> Tensor:
    """Predicted classes (H, n) of features (n, d) by every head; one that diverged says class 0."""
    parts = []
    for x in features.split(block):
        scores = torch.einsum("bd,hdc->hbc", x, weight) + bias[:, None]
        parts.append(scores.nan_to_num(-torch.inf).argmax(-1))
    return torch.cat(parts, dim=1)
