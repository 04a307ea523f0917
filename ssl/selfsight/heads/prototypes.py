"""Prototypes: unit vectors that features are compared with (Caron et al. 2020, section 3)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from selfsight.precision import full_precision


class Prototypes(nn.Module):
    """K unit vectors of D dimensions; the score of a feature is its cosine with each.

    `normalize()` puts the rows back onto the unit sphere; the method calls it after every update,
    and the constructor does, so that rows are unit vectors in every forward pass. (The released
    SwAV code normalises before each forward pass, VISSL after each update, which leaves VISSL's
    first pass with rows that are not.)

    Scores are computed in true fp32 whatever the autocast precision: Sinkhorn divides them by 0.05
    or less, which makes errors of half precision visible.
    """

    def __init__(self, *, width: int, count: int) -> None:
        super().__init__()
        linear = nn.Linear(width, count, bias=False)  # PyTorch's default initialisation, as SwAV
        self.weight = nn.Parameter(linear.weight.detach())
        self.normalize()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale every prototype to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) unit vectors in fp32 -> (..., K) cosines in fp32."""
        with full_precision(features.device):
            return F.linear(features.float(), self.weight.float())
