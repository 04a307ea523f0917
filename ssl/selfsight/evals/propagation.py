"""Label propagation through a video by features alone, and how well the outlines fit.

Protocol of DINO (Caron et al. 2021, section 4.2.1) after "Space-Time Correspondence as a
Contrastive Random Walk" (Jabri et al. 2020): each place of a frame takes the labels of the places
it is most like in the first frame and some previous ones, near to where it is. The measures are
those of DAVIS (Perazzi et al. 2016): J, the overlap of region and truth, and F, how much of the
outlines meet within 0.8 % of the image's diagonal.

Shapes: h x w places of a frame, n = h * w; C classes, the first one the background.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BOUND = 0.008  # of the diagonal, within which outlines meet
BLOCK = 512  # places of a frame compared at a time


def propagate(
    query: Tensor,
    context: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Labels of a frame from those of others.

    Args:
        query: (h, w, d) features of the frame.
        context: (h, w, d) features of each other frame.
        labels: (C, h, w) shares of the classes at each of its places.
        radius: places farther away than this in rows or columns, all on a circle's inside, are not
            asked.
        topk: most alike places, over all frames of the context, that answer.
        temperature: of the softmax over their cosines.

    Returns:
        (C, h, w) shares.
    """
    h, w, _ = query.shape
    unit = F.normalize(query.flatten(0, 1).float(), dim=1)  # (n, d)
    bank = torch.cat([F.normalize(f.flatten(0, 1).float(), dim=1) for f in context])  # (m * n, d)
    known = torch.cat([label.flatten(1) for label in labels], dim=1)  # (C, m * n)
    rows = torch.arange(h, device=query.device).repeat_interleave(w)
    columns = torch.arange(w, device=query.device).repeat(h)
    out = []
    for part in torch.arange(h * w, device=query.device).split(BLOCK):
        squared = (rows[part, None] - rows) ** 2 + (columns[part, None] - columns) ** 2
        far = (squared > radius**2).repeat(1, len(context))
        cosines = (unit[part] @ bank.T).masked_fill_(far, -torch.inf)
        found = cosines.topk(min(topk, cosines.shape[1]), dim=1)
        weights = (found.values / temperature).softmax(dim=1)  # (block, k)
        out.append(torch.einsum("bk,cbk->cb", weights, known[:, found.indices]))
    return torch.cat(out, dim=1).unflatten(1, (h, w))


def sharpened(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """Shares (C, h, w) enlarged to `size` (rows, columns) and decided: (rows, columns) integers.
    Each class is stretched to [0, 1] before, as DINO does, so that thin ones are not lost."""
    large = F.interpolate(shares[None], size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    stretched = torch.where(high > 0, (large - low) / (high - low).clamp(min=1e-12), large)
    return stretched.argmax(0)


def one_hot(mask: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """A mask (rows, columns) of integers as shares (C, h, w): each place has the label at its
    middle."""
    small = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, classes).permute(2, 0, 1).float()


def region_overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """J of two masks: intersection over union; 1 where both are empty."""
    union = np.logical_or(found, truth).sum()
    return float(np.logical_and(found, truth).sum() / union) if union else 1.0


def outline_match(found: np.ndarray, truth: np.ndarray, bound: float = BOUND) -> float:
    """F of two masks: harmonic mean of the shares of each outline that lie near the other's."""
    reach = int(np.ceil(bound * np.hypot(*truth.shape))) if bound < 1 else int(bound)
    span = np.arange(-reach, reach + 1)
    disc = (span[:, None] ** 2 + span**2 <= reach**2).astype(np.uint8)
    edges = [_outline(mask) for mask in (found, truth)]
    counts = [int(edge.sum()) for edge in edges]
    if not any(counts):
        return 1.0
    if not all(counts):
        return 0.0
    near = [cv2.dilate(edge, disc) for edge in edges]
    precision = float((edges[0] & near[1]).sum() / counts[0])
    recall = float((edges[1] & near[0]).sum() / counts[1])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels (uint8) whose right, lower, or diagonal neighbour is on the other side."""
    inside = mask.astype(bool)
    edge = np.zeros_like(inside)
    edge[:, :-1] |= inside[:, :-1] ^ inside[:, 1:]
    edge[:-1] |= inside[:-1] ^ inside[1:]
    edge[:-1, :-1] |= inside[:-1, :-1] ^ inside[1:, 1:]
    return edge.astype(np.uint8)
