"""Mixup and CutMix: images and labels of a batch mixed in pairs.

Mixup (Zhang et al. 2018, arXiv:1710.09412) adds two images with weights l and 1 - l, l from
Beta(a, a). CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a rectangle of one into the other; l
is the share of what is left. An image's partner is the one at its place in the reversed batch. All
draws come from torch's global random state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(b,) integers -> (b, classes): 1 - s at the label and s / classes everywhere besides
    (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    return F.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)


def mixup(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixed images (b, C, h, w) and targets (b, classes)."""
    share = Beta(alpha, alpha).sample().item()
    mixed = images.mul(share).add_(images.flip(0), alpha=1 - share)
    return mixed, targets.mul(share).add_(targets.flip(0), alpha=1 - share)


def cutmix(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same by rectangles, whose centre lies anywhere; what reaches over the rim is cut off."""
    share = Beta(alpha, alpha).sample().item()
    height, width = images.shape[-2:]
    cut = (1 - share) ** 0.5
    y, x = (torch.rand(2) * torch.tensor([height, width])).tolist()
    top, bottom = (round(min(max(y + s * cut * height / 2, 0), height)) for s in (-1, 1))
    left, right = (round(min(max(x + s * cut * width / 2, 0), width)) for s in (-1, 1))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, targets.mul(share).add_(targets.flip(0), alpha=1 - share)
