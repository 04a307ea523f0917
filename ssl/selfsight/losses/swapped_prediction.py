"""Swapped prediction: from each crop, predict the assignment of another crop of the same image.

Source: SwAV, Caron et al. 2020 (arXiv:2006.09882), section 3 and the released code: the mean over
assign crops a of the mean over all other crops v of the cross-entropy between the codes of a and
the softmax of v's scores. Same value and gradient here, with less work: the cross-entropy is linear
in its target, so each crop is compared once with the sum of the codes of the other assign crops,
one log-softmax a crop instead of one a pair, and the gradient is written down instead of recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfsight.precision import full_precision


def swapped_prediction_loss(
    scores_by_view: Sequence[Tensor],
    codes: Tensor,
    *,
    temperature: float,
    assign: Sequence[int] = (0, 1),
) -> Tensor:
    """Mean cross-entropy between codes and predictions, over pairs of crops of the same images.

    Args:
        scores_by_view: one (V_g, B, K) tensor a crop group: V_g crops of B images, scored against
            K prototypes. Crops are numbered through the groups, in order.
        codes: (A, B, K) assignments, each image's summing to 1; no gradient flows into them.
        temperature: of the softmax of the scores.
        assign: the number of the crop each of the A codes was computed from, in the first group.

    Returns:
        The loss, a scalar of the codes' precision. All arithmetic is in float32 or better,
        whatever autocast says; gradients have the dtype of the scores.

    Raises:
        ValueError: there is only one crop, so that there is nothing to predict.
    """
    crops = sum(scores.shape[0] for scores in scores_by_view)
    if crops < 2:
        raise ValueError("swapped prediction needs at least two crops of each image")
    assert len(assign) == codes.shape[0] == len(set(assign)), (tuple(assign), codes.shape)
    assert all(0 <= crop < scores_by_view[0].shape[0] for crop in assign), tuple(assign)
    assert all(scores.shape[1:] == codes.shape[1:] for scores in scores_by_view)
    assert codes.dtype in (torch.float32, torch.float64), codes.dtype
    loss = _SwappedPrediction.apply(codes, temperature, tuple(assign), *scores_by_view)
    assert isinstance(loss, Tensor)
    return loss


def _target(total: Tensor, codes: Tensor, assign: tuple[int, ...], crop: int) -> tuple[Tensor, int]:
    """The sum of the codes that crop number `crop` predicts, and how many they are."""
    if crop not in assign:
        return total, len(assign)
    own = assign.index(crop)
    if len(assign) == 2:  # the usual case needs no subtraction
        return codes[1 - own], 1
    return total - codes[own], len(assign) - 1


class _SwappedPrediction(torch.autograd.Function):
    """Keeps the probabilities of all crops between forward and backward, and the codes."""

    @staticmethod
    def forward(
        ctx, codes: Tensor, temperature: float, assign: tuple[int, ...], *scores_by_view: Tensor
    ) -> Tensor:
        # Every crop has the same weight: each assign crop has the same number of other crops.
        crops = sum(scores.shape[0] for scores in scores_by_view)
        weight = 1 / (len(assign) * (crops - 1) * codes.shape[1])
        total = codes.sum(dim=0)
        probabilities: list[Tensor] = []
        costs: list[Tensor] = []
        crop = 0
        with full_precision(codes.device):
            for scores in scores_by_view:
                logits = torch.div(scores.to(codes.dtype), temperature)
                p = torch.softmax(logits, dim=2)
                # The logarithm of the sum of exponentials, without another pass of them.
                log_sums = (logits.amax(dim=2) - p.amax(dim=2).log_()).sum(dim=1)
                for one, log_sum in zip(logits, log_sums, strict=True):
                    target, targets = _target(total, codes, assign, crop)
                    costs.append(log_sum * targets - (one * target).sum())
                    crop += 1
                probabilities.append(p)
            loss = torch.stack(costs).sum() * weight
        ctx.save_for_backward(codes, total, *probabilities)
        ctx.assign, ctx.factor = assign, weight / temperature
        ctx.dtypes = [scores.dtype for scores in scores_by_view]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        codes, total, *probabilities = ctx.saved_tensors
        # d loss / d scores = weight / temperature * (targets * softmax - target), as codes sum to 1
        factor = grad_outputs[0] * ctx.factor
        gradients: list[Tensor | None] = []
        crop = 0
        for p, dtype, needed in zip(
            probabilities, ctx.dtypes, ctx.needs_input_grad[3:], strict=True
        ):
            gradient = torch.empty_like(p) if needed else None
            for number in range(p.shape[0] if gradient is not None else 0):
                target, targets = _target(total, codes, ctx.assign, crop + number)
                assert gradient is not None
                if targets:
                    torch.sub(p[number], target, alpha=1 / targets, out=gradient[number])
                    gradient[number].mul_(factor * targets)
                else:
                    gradient[number].zero_()
            gradients.append(gradient.to(dtype) if gradient is not None else None)
            crop += p.shape[0]
        return None, None, None, *gradients
