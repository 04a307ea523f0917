"""What a DINO student is to predict: the teacher's scores, kept from collapse.

Two ways, both followed or preceded by a softmax of low temperature, which sharpens:

    centre      softmax((scores - centre) / temperature), the centre a moving average of the mean
                score over the global batch (DINO, Caron et al. 2021, arXiv:2104.14294, equation 4).
                As in the released code a batch moves the centre after it has been used.
    sinkhorn    the assignment that uses all prototypes equally (SwAV's; DINOv2, arXiv:2304.07193),
                over all crops and samples of all ranks together.
    none        softmax(scores / temperature): collapses; for experiments.
"""

import torch
from torch import Tensor, nn

from selfsight.distributed import collectives
from selfsight.losses.sinkhorn import sinkhorn
from selfsight.precision import full_precision

CENTRINGS = ("centre", "sinkhorn", "none")


class Targets(nn.Module):
    """Turns teacher scores into targets.

    Args:
        prototypes: number K of scores.
        centring: `centre`, `sinkhorn` or `none`.
        momentum: share that the centre keeps at each update.
        iterations: normalisations of Sinkhorn.

    Attributes:
        centre: (K) the average; zeros, and unused, unless `centring` is `centre`.

    Raises:
        ValueError: there is no such centring.
    """

    centre: Tensor

    def __init__(
        self, prototypes: int, *, centring: str, momentum: float = 0.9, iterations: int = 3
    ) -> None:
        super().__init__()
        if centring not in CENTRINGS:
            raise ValueError(f"method.centring={centring} is not one of {', '.join(CENTRINGS)}")
        self.centring, self.momentum, self.iterations = centring, momentum, iterations
        self.register_buffer("centre", torch.zeros(prototypes))
        self._sums: list[Tensor] = []  # (K + 1): sums and number of the scores of a micro-batch

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a sample's target depends on the other samples of the same update."""
        return self.centring == "sinkhorn"

    @torch.no_grad()
    def forward(self, scores: Tensor, temperature: float) -> Tensor:
        """(..., K) scores in float32 -> targets of the same shape, each summing to 1.

        Every rank calls it equally often; the number of scores may differ between them.
        """
        if self.centring == "sinkhorn":
            flat = scores.flatten(0, -2)[None]
            # ranks differ in the number of masked patches
            count = scores.new_full((), float(flat.shape[1]))
            codes = sinkhorn(
                flat,
                epsilon=temperature,
                iterations=self.iterations,
                global_samples=collectives.all_reduce_sum(count).clamp(min=1),
                sum_over_ranks=collectives.all_reduce_sum,
            )
            return codes.view(scores.shape)
        if self.centring == "centre":
            flat = scores.flatten(0, -2)
            count = scores.new_full((1,), float(flat.shape[0]))
            self._sums.append(torch.cat([flat.sum(dim=0), count]))
        with full_precision(scores.device):
            return torch.softmax((scores - self.centre) / temperature, dim=-1)

    @torch.no_grad()
    def follow(self, ok: Tensor) -> None:
        """Move the centre by all scores since the last call, of all ranks; not where `ok`, a
        boolean scalar on their device, is false."""
        if self.centring != "centre" or not self._sums:
            return
        total = collectives.all_reduce_sum(torch.stack(self._sums).sum(dim=0))
        self._sums.clear()
        mean = total[:-1] / total[-1].clamp(min=1)
        moved = self.centre * self.momentum + mean * (1 - self.momentum)
        self.centre.copy_(torch.where(ok & (total[-1] > 0), moved, self.centre))


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of (..., K) distributions, in nats; 0 if there are none."""
    each = -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return each.sum() / max(1, each.numel())


@torch.no_grad()
def participation(features: Tensor) -> Tensor:
    """How many directions features (n, D) vary along: (sum l)^2 / sum l^2 over the eigenvalues l of
    their covariance, from 1 (or 0 if all are equal) to min(n - 1, D). Needs no decomposition, so it
    is cheap enough for every update."""
    with full_precision(features.device):
        centred = features.float() - features.float().mean(dim=0)
        gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        return gram.trace().square() / gram.square().sum().clamp(min=1e-30)
