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
    device = features.device
    lr = torch.tensor(rates, device=device).view(-1, 1, 1)
    weight = torch.zeros(len(rates), d + 1, classes, device=device)  # the last row is the bias
    velocity = torch.zeros_like(weight)
    decay = torch.full((d + 1, 1), weight_decay, device=device)
    decay[-1] = 0
    batch_size = min(batch_size, n)
    schedule = schedule or (lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    order, place = torch.randperm(n, generator=generator), 0
    for step in range(steps):
        if place + batch_size > n:
            order, place = torch.randperm(n, generator=generator), 0
        rows = order[place : place + batch_size].to(device)
        place += batch_size
        x, y = features[rows], labels[rows]
        x = torch.cat([x, torch.ones(len(x), 1, device=device)], 1)
        error = torch.softmax(torch.einsum("bd,hdc->hbc", x, weight), -1)
        error[:, torch.arange(len(y), device=device), y] -= 1
        gradient = torch.einsum("bd,hbc->hdc", x, error).div_(len(x)).add_(weight * decay)
        velocity.mul_(momentum).add_(gradient)
        update = gradient.add_(velocity, alpha=momentum) if nesterov else velocity
        weight.sub_(update * (lr * schedule(step)))
    return weight[:, :-1], weight[:, -1]


@torch.no_grad()
def predict_heads(features: Tensor, weight: Tensor, bias: Tensor, block: int = 8192) -> Tensor:
    """Predicted classes (H, n) of features (n, d) by every head; heads that diverged say class 0."""
    parts = []
    for x in features.split(block):
        scores = torch.einsum("bd,hdc->hbc", x, weight) + bias[:, None]
        parts.append(scores.nan_to_num(-torch.inf).argmax(-1))
    return torch.cat(parts, dim=1)
