"""Where a vision transformer's class token looks ("Emerging Properties in Self-Supervised Vision
Transformers", DINO, Caron et al. 2021, section 4.2.2 and figure 3)."""

from typing import Any

import torch
from torch import Tensor

from selfsight.trunks.trunk import Trunk

KEPT_MASS = 0.6  # of a head's attention, inside its mask; DINO's choice


def attends(trunk: Trunk) -> bool:
    """Whether a trunk has a class token whose attention can be shown."""
    return hasattr(trunk, "attention") and hasattr(trunk, "prefix_tokens")


@torch.no_grad()
def class_attention(trunk: Any, images: Tensor) -> Tensor:
    """Attention of the last block's class token to the patches, for normalised images (b, c, h, w):
    (b, heads, h / patch, w / patch). Each head's sums to at most 1: the rest goes to the class
    token itself and to registers."""
    rows, columns = (side // trunk.patch_size for side in images.shape[-2:])
    scores = trunk.attention(images)[:, :, 0, trunk.prefix_tokens :]
    return scores.float().unflatten(-1, (rows, columns))


def mass_mask(maps: Tensor, mass: float = KEPT_MASS) -> Tensor:
    """The fewest patches that together hold `mass` of each map's sum: (..., rows, columns) -> bool.

    A map of zeros has an empty mask.
    """
    flat = maps.flatten(-2)
    shares, order = (flat / flat.sum(-1, keepdim=True).clamp(min=1e-12)).sort(-1, descending=True)
    before = shares.double().cumsum(-1) - shares  # what the larger ones hold
    kept = (before < mass) & (shares > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept).unflatten(-1, maps.shape[-2:])


@torch.no_grad()
def patch_features(trunk: Any, images: Tensor) -> Tensor:
    """Features of places in normalised images (b, c, h, w): (b, rows, columns, width). Of a vision
    transformer the patches after the last norm, of other trunks the last feature map."""
    if attends(trunk):
        rows, columns = (side // trunk.patch_size for side in images.shape[-2:])
        tokens: Tensor = trunk.tokens(images)
        return tokens[:, trunk.prefix_tokens :].float().unflatten(1, (rows, columns))
    last = list(trunk.features(images).values())[-1]
    return last.float().permute(0, 2, 3, 1)
