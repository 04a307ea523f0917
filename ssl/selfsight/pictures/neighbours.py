"""Images whose features are alike."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def nearest(
    queries: Tensor, bank: Tensor, count: int, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For features (n, d) the `count` nearest of a bank (m, d) by cosine: cosines and indices,
    (n, count) each, nearest first.

    Args:
        own: Where each query lies in the bank itself, to be left out; (n,) or None.
    """
    cosines = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    room = len(bank)
    if own is not None:
        cosines.scatter_(1, own[:, None], -2.0)
        room -= 1
    found = cosines.topk(min(count, room), dim=1)
    return found.values, found.indices
