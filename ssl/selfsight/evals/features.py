"""Features of images from a trunk, extracted in parallel over ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from selfsight.distributed import collectives
from selfsight.trunks.trunk import Trunk


@torch.no_grad()
def extract(
    trunk: Trunk,
    images: Tensor,
    *,
    normalize: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Features (n, width), fp32 on the CPU, of uint8 images (n, 3, s, s), the same on all ranks.

    Each rank takes an equal share of the images, the last ones padded with repeats. The trunk is
    run in the mode it is in.
    """
    ranks, rank = collectives.size(), collectives.rank()
    share = -(-len(images) // ranks)
    own = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts = []
    for indices in own.split(batch_size):
        with autocast():
            parts.append(trunk(normalize(images[indices].to(device))).float())
    return collectives.all_gather_rows(torch.cat(parts))[: len(images)].cpu()
