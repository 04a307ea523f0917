"""Masked prediction: what the teacher says of patches that the student does not see (iBOT, Zhou et
al. 2022, arXiv:2111.07832, section 3.1; DINOv2, arXiv:2304.07193)."""

import torch
from torch import Tensor

from selfsight.precision import full_precision


def masked_prediction_loss(
    scores: Tensor, targets: Tensor, weights: Tensor, *, images: int, temperature: float
) -> Tensor:
    """Mean over images of the mean cross-entropy of an image's masked patches.

    An image without masked patches counts as 0, as in both released codes.

    Args:
        scores: (m, K) of the student, for the masked patches of all images.
        targets: (m, K) of the teacher, each summing to 1; no gradient flows into them.
        weights: (m) one over the number of masked patches of the patch's image.
        images: number of images, those without masked patches too.
        temperature: of the softmax of the scores.

    Returns:
        A scalar, float32; 0 with gradients of 0 if nothing is masked.
    """
    with full_precision(scores.device):
        logits = scores.float() / temperature
        costs = torch.logsumexp(logits, dim=1) - (targets * logits).sum(dim=1)
        return (costs * weights).sum() / images
