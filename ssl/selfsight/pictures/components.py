"""Principal components: of patches, as colours; of images, as a map."""

from collections.abc import Sequence

import torch
from torch import Tensor


def principal(features: Tensor, count: int) -> Tensor:
    """The first `count` principal components of features (n, d): scores (n, count), float64.

    Signs are fixed (the largest score of a component by magnitude is positive), so the same
    features give the same picture. Where there are fewer components, the rest are zeros.
    """
    centred = features.double().cpu()
    centred = centred - centred.mean(0)
    scores = torch.zeros(len(features), count, dtype=torch.float64)
    count = min(count, *features.shape)
    if len(features) <= features.shape[1]:  # whichever matrix of products is the smaller one
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        found = vectors[:, -count:].flip(1) * values[-count:].flip(0).clamp(min=0).sqrt()
    else:
        vectors = torch.linalg.eigh(centred.T @ centred)[1]
        found = centred @ vectors[:, -count:].flip(1)
    signs = found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    scores[:, :count] = found * torch.where(signs == 0, 1.0, signs)
    return scores


def as_colours(maps: Sequence[Tensor]) -> list[Tensor]:
    """Features (rows, columns, d) of each image as RGB in [0, 1], (rows, columns, 3): the first
    three principal components over all places of all images together, each stretched between its
    2nd and 98th percentile. Places that mean the same have one colour, across images too."""
    scores = principal(torch.cat([m.flatten(0, 1) for m in maps]), 3)
    ordered = scores.sort(0).values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.02, 0.98))
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    parts = colours.split([m.shape[0] * m.shape[1] for m in maps])
    return [part.unflatten(0, m.shape[:2]) for part, m in zip(parts, maps, strict=True)]
