"""Sinkhorn-Knopp: soft assignments of samples to prototypes that use every prototype equally.

Source: Cuturi 2013 (arXiv:1306.0895); SwAV, Caron et al. 2020 (arXiv:2006.09882), section 3.1 and
the released code, whose order is kept: exp(scores / epsilon), then, `iterations` times, prototypes
to equal mass, then samples to equal mass.

Differences from the released code, none of which changes the result in exact arithmetic:

- The matrix is not rewritten in each iteration. The scaling form keeps one factor a prototype and
  one a sample, and an iteration is two matrix-vector products. The log form keeps only the
  logarithm of the prototypes' factors: normalising the samples is then a softmax.
- The division by the global sum is left out: the first normalisation of the prototypes undoes it.
- No maximum is exchanged between ranks. Scores are cosines, so exp(+-1 / epsilon) bounds every
  entry, and float32 holds that down to an epsilon of 0.0114. Between two iterations of the log
  form, each prototype's mass is at least 1/K of a sample (the samples have just been normalised),
  so plain sums are safe there, at any epsilon.
- Only sums over the prototypes are exchanged, for all assign crops at once, and no value is read
  back to the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from selfsight.precision import full_precision

# Below this the factors of the scaling form, up to exp(2 / epsilon), leave float32's range.
SCALING_EPSILON = 0.025


def identity(tensor: Tensor) -> Tensor:
    """The sum over the ranks of a world of one."""
    return tensor


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    iterations: int,
    global_samples: int | Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] = identity,
    method: str = "auto",
) -> Tensor:
    """Assign samples to prototypes under equal use of the prototypes.

    Args:
        scores: (A, B, K) cosines in [-1, 1], float32 or float64: A assign crops, each a transport
            problem of its own, B samples of this rank (with those of a queue, if there is one), K
            prototypes. Cosines of half precision are refused: their error is divided by `epsilon`.
        epsilon: weight of the entropy; smaller is sharper. At least 0.002 in the log form.
        iterations: normalisations of prototypes and samples, at least 1.
        global_samples: samples of all ranks together, B if not given; a number, or a scalar on the
            scores' device that is not read by the host. The assignments do not depend on it; it
            keeps the factors near 1. It must be the same on all ranks.
        sum_over_ranks: returns the sum of a tensor over all ranks, in a tensor that may be changed.
            Every rank calls it equally often: `iterations` times with (A, 1, K) values in the
            scaling form, once more in the log form.
        method: "scaling" (two matrix-vector products an iteration; epsilon >= 0.025), "log" (a
            softmax an iteration; any epsilon), or "auto", which takes the first where it may.

    Returns:
        (A, B, K) codes, in the dtype of the scores: each sample's sum to 1.

    Raises:
        ValueError: scores of half precision, no iteration, an epsilon or a method that cannot be.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Sinkhorn needs scores computed in float32, not {scores.dtype}: "
            "turn autocast off around the prototypes"
        )
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
    if method == "auto":
        method = "scaling" if epsilon >= SCALING_EPSILON else "log"
    if method not in ("scaling", "log"):
        raise ValueError(f"unknown Sinkhorn method {method!r}: use auto, scaling or log")
    smallest = SCALING_EPSILON if method == "scaling" else 0.002
    if epsilon < smallest:
        raise ValueError(
            f"Sinkhorn's {method} form needs an epsilon of at least {smallest}, not {epsilon}"
        )
    assert scores.ndim == 3, f"scores must be (assign crops, samples, prototypes), {scores.shape=}"

    solve = _scaling if method == "scaling" else _log
    samples = scores.shape[1] if global_samples is None else global_samples
    with full_precision(scores.device):
        return solve(scores, epsilon, iterations, samples, sum_over_ranks)


def _scaling(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    samples: int | Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    crops, local_samples, prototypes = scores.shape
    # Mass of B a prototype and K a sample, so that both vectors of factors are centred at 1.
    prototype_mass = scores.new_ones(()) * samples
    sample_mass = scores.new_full((), float(prototypes))
    # A total of zero would need cosines outside [-1, 1]; even then nothing is divided by it.
    tiny = torch.finfo(scores.dtype).tiny

    kernel = torch.mul(scores, 1 / epsilon).exp_()
    transposed = kernel.transpose(1, 2)
    by_sample = scores.new_ones(crops, 1, local_samples)
    by_prototype = by_sample
    for _ in range(iterations):
        totals = sum_over_ranks(torch.bmm(by_sample, kernel))
        by_prototype = torch.div(prototype_mass, totals.clamp_min_(tiny))
        totals = torch.bmm(by_prototype, transposed)
        by_sample = torch.div(sample_mass, totals.clamp_min_(tiny))
    return kernel.mul_(by_prototype).mul_((by_sample / sample_mass).transpose(1, 2))


def _log(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    samples: int | Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    logits = scores / epsilon
    log_share = torch.log(scores.new_ones(()) * samples / scores.shape[2])

    # The first totals span exp(-1 / epsilon) to exp(1 / epsilon), too much to add up over ranks as
    # they are. A root of them fits in float32, and the sum of the roots gives a shift that all
    # ranks share and that exceeds the largest total by little: log(ranks) / root.
    local = torch.logsumexp(logits, dim=1, keepdim=True)
    root = min(1.0, 40 * epsilon)
    bound = 1 / epsilon
    shift = sum_over_ranks(((local - bound) * root).exp_()).log_().div_(root).add_(bound)
    totals = sum_over_ranks((local - shift).exp_())
    by_prototype = log_share - shift - totals.log_()

    shifted = logits + by_prototype
    codes = torch.softmax(shifted, dim=2)
    for _ in range(iterations - 1):
        totals = sum_over_ranks(codes.sum(dim=1, keepdim=True))
        by_prototype += log_share - totals.log_()
        torch.add(logits, by_prototype, out=shifted)
        torch.softmax(shifted, dim=2, out=codes)
    return codes
