"""Average precision: of classes (multi-label) and of ranked lists (retrieval)."""

import torch
from torch import Tensor


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Area under the precision-recall curve by its steps, sum of (R_n - R_n-1) P_n; images of equal
    score come together. That of scikit-learn and of VOC from 2010 on.

    Args:
        scores: (n,).
        targets: (n,) 1 and 0; what is not judged has been left out.

    Returns:
        Between 0 and 1; NaN where nothing is 1.
    """
    order = scores.double().argsort(descending=True, stable=True)
    hits = (targets[order] > 0).double()
    total = hits.sum()
    if not total:
        return float("nan")
    ranked = scores[order]
    last = torch.ones(len(ranked), dtype=torch.bool, device=ranked.device)
    last[:-1] = ranked[1:] != ranked[:-1]  # the last image of each score
    found = hits.cumsum(0)[last]
    seen = torch.arange(1, len(ranked) + 1, device=ranked.device)[last]
    recall = torch.cat([found.new_zeros(1), found]) / total
    return ((recall[1:] - recall[:-1]) * found / seen).sum().item()


def interpolated_precision(scores: Tensor, targets: Tensor) -> float:
    """VOC2007's: the mean over recalls 0, 0.1, ..., 1 of the best precision at that recall or
    beyond (Everingham et al. 2010, section 4.2)."""
    order = scores.double().argsort(descending=True, stable=True)
    hits = (targets[order] > 0).double()
    total = hits.sum()
    if not total:
        return float("nan")
    found = hits.cumsum(0)
    recall = found / total
    precision = found / torch.arange(1, len(hits) + 1, device=hits.device)
    best = [
        precision[recall >= r - 1e-12].max()
        if (recall >= r - 1e-12).any()
        else precision.new_zeros(())
        for r in torch.linspace(0, 1, 11, dtype=torch.float64)
    ]
    return torch.stack(best).mean().item()


def ranking_precision(relevant: Tensor, junk: Tensor | None = None) -> float:
    """Average precision of one ranked list as the revisited Oxford and Paris benchmarks compute it
    (Radenovic et al. 2018, arXiv:1803.11285): trapezoids, and junk taken out of the list.

    Args:
        relevant: (n,) booleans in the order of the ranking.
        junk: (n,) likewise, or None.

    Returns:
        Between 0 and 1; NaN where nothing is relevant.
    """
    if junk is not None:
        relevant = relevant[~junk]
    ranks = relevant.nonzero().flatten().double()
    if not len(ranks):
        return float("nan")
    before = torch.arange(len(ranks), dtype=torch.float64, device=ranks.device)
    # precision just before and just after each relevant image
    left = torch.where(ranks > 0, before / ranks.clamp(min=1), 1.0)
    right = (before + 1) / (ranks + 1)
    return ((left + right) / 2).mean().item()
