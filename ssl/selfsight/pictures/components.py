"""Principal components: of patches, as colours; of images, as a map."""

import torch
from torch import Tensor


def principal(features: Tensor, count: int) -> Tensor:
    """The first `count` principal components of features (n, d): scores (n, count), float64.

    Signs are fixed (the largest score of a component by magnitude is positive), so the same
    features give the same picture. Where there are fewer components, the rest are zeros.
    """
    centred = features.double() - features.double().mean(0)
    scores = torch.zeros(len(features), count, dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(centred.cpu(), full_matrices=False)
    found = (left * singular)[:, :count]
    signs = found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    scores[:, : found.shape[1]] = found * torch.where(signs == 0, 1.0, signs)
    return scores


def as_colours(features: Tensor) -> Tensor:
    """Features (b, rows, columns, d) as RGB in [0, 1], (b, rows, columns, 3): the first three
    principal components over all places of all images together, each stretched between its 2nd
    and 98th percentile. Places that mean the same have one colour, across images too."""
    scores = principal(features.flatten(0, 2), 3)
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    stretched = (scores - low) / (high - low).clamp(min=1e-12)
    return stretched.clamp(0, 1).float().unflatten(0, features.shape[:3])
