"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018, arXiv:1805.01978,
section 3.4), the field's quickest measure of what a trunk has learnt without labels."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    block: int = 1024,
) -> Tensor:
    """Predicted class of each query.

    Each of the k nearest bank features by cosine votes for its label with weight
    exp(cosine / temperature). Exact; queries go in blocks, so memory is block x bank.

    Args:
        bank: (m, d) features, any scale.
        bank_labels: (m,) integers counting from 0.
        queries: (n, d).
        neighbours: k; a bank of fewer features gives them all.
        classes: Number of classes; by default the largest label and one.

    Returns:
        (n,) integers.
    """
    classes = classes or int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=1)
    predictions = []
    for part in queries.split(block):
        cosines, indices = (F.normalize(part.float(), dim=1) @ bank.T).topk(
            min(neighbours, len(bank)), dim=1
        )
        votes = torch.zeros(len(part), classes, device=bank.device)
        # relative to the nearest: the same ranking, and exp cannot overflow
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes.scatter_add_(1, bank_labels[indices], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, **options
) -> float:
    """Top-1 accuracy in percent of `knn_predict`, with its options."""
    predictions = knn_predict(bank, bank_labels, queries, **options)
    return (predictions == labels).float().mean().item() * 100
