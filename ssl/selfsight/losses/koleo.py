"""KoLeo: a loss that spreads features evenly (Sablayrolles et al. 2019, "Spreading vectors for
similarity search", arXiv:1806.03198; DINOv2, arXiv:2304.07193, gives it a weight of 0.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.distributed import collectives
from selfsight.precision import full_precision

EPSILON = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """Mean of -log distance between each feature and its nearest neighbour, all of unit length.

    Neighbours are looked for among the features of all ranks, and the loss and (after DDP's mean
    over ranks) its gradient are those of one rank that holds them all. DINOv2 looks on each GPU by
    itself. Equal features give a large value, not an infinite one.

    Args:
        features: (b, D) of this rank, one crop of each image; b is the same on all ranks.

    Returns:
        A scalar, float32, equal on all ranks.

    Raises:
        ValueError: there is one feature alone.
    """
    ranks, rank, b = collectives.size(), collectives.rank(), features.shape[0]
    if b * ranks < 2:
        raise ValueError(
            "KoLeo needs at least two images at a time: set method.koleo_weight=0, or raise "
            "batch_size or images_per_device"
        )
    with full_precision(features.device):
        own = F.normalize(features.float(), dim=-1)
        every = own
        if ranks > 1:
            others = collectives.all_gather_rows(own.detach())
            every = torch.cat([others[: rank * b], own, others[(rank + 1) * b :]])
        with torch.no_grad():
            nearest = (every @ every.T).fill_diagonal_(-2.0).argmax(dim=1)
        distances = (every - every[nearest] + EPSILON).norm(dim=1)
        loss = -(distances + EPSILON).log().mean()
    # The gradient towards the own rows is that of the whole loss; DDP will divide it by the ranks.
    return loss.detach() + ranks * (loss - loss.detach())
