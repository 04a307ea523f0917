"""Figures of features that need no labels: how many directions they use, how evenly they spread."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of features (n, d): exp of the entropy of their singular values' shares
    (RankMe, Garrido et al. 2023, arXiv:2210.02885, equation 3). Between 1 and min(n, d)."""
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp(min=1e-300) + epsilon
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def uniformity(features: Tensor) -> float:
    """log of the mean over pairs of exp(-2 |x - y|^2) for features (n, d) scaled to unit length
    (Wang and Isola 2020, arXiv:2005.10242). 0 if all are alike; the lower, the more even."""
    unit = F.normalize(features.double(), dim=1)
    squared = (2 - 2 * unit @ unit.T).clamp(min=0)
    n = len(unit)
    total = torch.exp(-2 * squared).sum() - n  # without the pairs of each with itself
    return torch.log(total.clamp(min=1e-300) / (n * (n - 1))).item()
