"""SwAV: learning by predicting one view's cluster assignment from another (Caron et al. 2020,
"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv:2006.09882),
also the method of SEER (Goyal et al. 2021, arXiv:2103.01988).

Differences from the released code (facebookresearch/swav, VISSL):
- Assignments are computed over the whole global batch, under gradient accumulation too (a first
  pass without gradient), so one GPU solves the same transport problem as 64.
- The assign crops are solved in one stack, and only sums cross ranks.
- The queue is a buffer of the checkpoint, the same on all ranks in the order of the stream's
  lanes; the released code keeps one file a rank, VISSL saves rank 0's only.

Shapes: A assign crops, V views of one size, b samples of this rank or micro-batch, D dimensions of
the projection, K prototypes, L queued samples.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.distributed import collectives
from selfsight.distributed.batchnorm import frozen_running_statistics
from selfsight.heads.projection import ProjectionHead
from selfsight.heads.prototypes import Prototypes
from selfsight.losses.sinkhorn import sinkhorn
from selfsight.losses.swapped_prediction import swapped_prediction_loss
from selfsight.methods.method import Method, Now, Verdict
from selfsight.trunks.trunk import Trunk

QUEUE_SETTLES = 200  # updates in which a jump of the loss is laid to the queue that has joined

Codes = list[Tensor]  # per prototype head: (A, b, K)


class SwAV(Method):
    """Swapped prediction of Sinkhorn assignments.

    Args:
        trunk: Gives (n, trunk.width) features of images.
        head: Projects them; its output is normalised to unit length here.
        prototypes: Number of prototypes, or one number per prototype head.
        temperature: Of the softmax over prototypes that predicts.
        epsilon: Entropy weight of the transport problem.
        sinkhorn_iterations: Row and column normalisations of it.
        assign_crops: Number A of crops whose assignments the others predict: the first group's.
        freeze_prototypes_steps: Prototypes receive no update for so many steps (no momentum, no
            weight decay).
        queue_length: Samples of past batches that join the transport problem; a multiple of the
            global batch size, 0 for none.
        queue_start_step: First step whose assignments use the queue. It is filled from step 0.

    Raises:
        ValueError: the head does not take what the trunk gives.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        head: ProjectionHead,
        prototypes: int | list[int] = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        assign_crops: int = 2,
        freeze_prototypes_steps: int = 313,
        queue_length: int = 0,
        queue_start_step: int = 0,
    ) -> None:
        super().__init__()
        if head.in_width != trunk.width:
            raise ValueError(
                f"the head takes {head.in_width} channels and the trunk gives {trunk.width}: "
                f"set model.head.widths to begin with {trunk.width}"
            )
        counts = [prototypes] if isinstance(prototypes, int) else list(prototypes)
        if not counts or min(counts) < 2:
            raise ValueError(f"method.prototypes={prototypes} must be at least 2 for every head")
        self.trunk = trunk
        self.head = head
        self.prototypes = nn.ModuleList(Prototypes(width=head.width, count=k) for k in counts)
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.freeze_prototypes_steps = freeze_prototypes_steps
        self.queue_start_step = queue_start_step
        # unit vectors, newest first; zeros (equally near to all prototypes) until filled
        self.queue: Tensor  # (A, L, D)
        self.register_buffer("queue", torch.zeros(assign_crops, queue_length, head.width))
        self._fresh: list[Tensor] = []  # (A, b, D) of each micro-batch of the step under way

    # ------------------------------------------------------------------------------- forward

    @property
    def warmup_steps(self) -> int:
        return self.freeze_prototypes_steps

    def forward(
        self, batch: Batch, now: Now, plan: Codes | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = [self.embed(views) for views in batch.views]  # each (V, b, D)
        scores = [[p(z) for z in features] for p in self.prototypes]  # [head][size] (V, b, K)
        codes = plan or self.assign([s[0].detach() for s in scores], now)
        losses = [
            swapped_prediction_loss(s, q, temperature=self.temperature, assign=range(q.shape[0]))
            for s, q in zip(scores, codes, strict=True)
        ]
        loss = torch.stack(losses).mean()
        if self.queue.shape[1]:
            self._fresh.append(features[0].detach())
        return loss, self._metrics(features[0].detach(), scores[0][0].detach(), codes[0])

    def embed(self, views: Tensor) -> Tensor:
        """uint8 (V, b, 3, s, s) -> unit vectors in fp32 (V, b, D). One pass for all views of a
        size, so that BatchNorm sees them together."""
        projected = self.head(self.trunk(self.normalize_pixels(views)))
        return F.normalize(projected.float(), dim=-1).unflatten(0, views.shape[:2])

    @torch.no_grad()
    def plan(self, micro_batches: Sequence[Batch], now: Now) -> list[Codes]:
        """Assignments over the whole global batch, cut to micro-batches."""
        scores: list[list[Tensor]] = []
        with frozen_running_statistics(self):
            for index, batch in enumerate(micro_batches):
                now.reseed(index)
                features = self.embed(batch.views[0])
                scores.append([p(features) for p in self.prototypes])
        whole = [torch.cat(parts, dim=1) for parts in zip(*scores, strict=True)]
        codes = self.assign(whole, now)
        sizes = [len(batch.positions) for batch in micro_batches]
        return [list(c) for c in zip(*(q.split(sizes, dim=1) for q in codes), strict=True)]

    @torch.no_grad()
    def assign(self, scores: list[Tensor], now: Now) -> Codes:
        """Codes of this rank's samples, per head (A, b, K), from the global transport problem."""
        b = scores[0].shape[1]
        length = self.queue.shape[1]
        if length and now.step >= self.queue_start_step:
            share = length // collectives.size()
            own = self.queue[:, collectives.rank() * share :][:, :share]
            scores = [
                torch.cat([s, p(own)], 1) for s, p in zip(scores, self.prototypes, strict=True)
            ]
        return [
            sinkhorn(
                s,
                epsilon=self.epsilon,
                iterations=self.sinkhorn_iterations,
                sum_over_ranks=collectives.all_reduce_sum,
                global_samples=s.shape[1] * collectives.size(),
            )[:, :b]
            for s in scores
        ]

    # ------------------------------------------------------------------------ around the update

    def after_backward(self, now: Now) -> None:
        if now.step < self.freeze_prototypes_steps:
            for parameter in self.prototypes.parameters():
                parameter.grad = None  # the optimiser skips it: no momentum, no weight decay

    @torch.no_grad()
    def after_step(self, now: Now, ok: Tensor) -> None:
        for prototypes in self.prototypes:
            assert isinstance(prototypes, Prototypes)
            prototypes.normalize()
        if self.queue.shape[1]:
            fresh = torch.cat(self._fresh, dim=1)  # (A, b, D): this rank's lanes in order
            fresh = collectives.all_gather_rows(fresh.transpose(0, 1).contiguous()).transpose(0, 1)
            pushed = torch.cat([fresh, self.queue], dim=1)[:, : self.queue.shape[1]]
            self.queue.copy_(torch.where(ok, pushed, self.queue))
        self._fresh.clear()

    # ------------------------------------------------------------------------------ figures

    def scores(self, features: Tensor) -> Tensor:
        return self.prototypes[0](F.normalize(self.head(features).float(), dim=-1))

    def _metrics(self, features: Tensor, scores: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Figures that tell health from collapse, on the device and without synchronisation."""
        entropy = -torch.special.xlogy(codes, codes).sum(-1).mean()
        nearest = scores.argmax(-1).flatten()
        used = torch.zeros(scores.shape[-1], device=scores.device)
        used.scatter_add_(0, nearest, torch.ones_like(nearest, dtype=used.dtype))
        centre = features.mean(dim=(0, 1))
        return {
            "assignment_entropy": entropy,
            "feature_spread": (1 - centre.square().sum()).clamp(min=0).sqrt(),
            "prototype_counts": used,
        }

    def figures(self, means: Mapping[str, float], sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Adds the share of prototypes nearest to some sample since the last log line."""
        counts = sums["prototype_counts"]
        return {**means, "prototypes_used": (counts > 0).float().mean().item()}

    def explain_spike(self, step: int) -> Verdict | None:
        """A jump as the queue joins is the queue's: its features are older than the prototypes."""
        joined = self.queue_start_step
        if self.queue.shape[1] and joined and joined <= step <= joined + QUEUE_SETTLES:
            return Verdict(
                "queue too early",
                f"the loss jumped when the queue of {self.queue.shape[1]:,} samples joined at step "
                f"{joined}",
                "raise method.queue_start_step, or shorten method.queue_length",
                "its features are older than the prototypes, which still change quickly",
            )
        return None

    def diagnose(self, figures: Mapping[str, float], now: Now) -> Verdict:
        """Name a collapse: `uniform` if assignments tell nothing apart, `one-point` if features
        are all alike. ln K is the loss and the entropy of knowing nothing."""
        k = self.prototypes[0].get_parameter("weight").shape[0]
        ln_k = math.log(k)
        loss, entropy = figures["loss"], figures["assignment_entropy"]
        spread, used = figures["feature_spread"], figures["prototypes_used"]
        remedy = (
            "try a smaller method.epsilon (0.03), a longer method.freeze_prototypes_steps, "
            "a lower schedule.base_lr, or a head without BatchNorm"
        )
        if spread < 0.03:
            return Verdict(
                "one-point collapse",
                f"all features are alike (spread {spread:.3f} of 1, {used:.0%} of prototypes used)",
                remedy,
                "steps too large for the head, or codes that put all samples into few prototypes",
            )
        stuck = loss > 0.995 * ln_k
        if stuck and self.queue.shape[1] and now.step >= self.queue_start_step:
            return Verdict(
                "queue too early",
                f"the loss {loss:.3f} is at ln {k} = {ln_k:.3f} with a queue of "
                f"{self.queue.shape[1]:,} samples since step {self.queue_start_step}",
                "raise method.queue_start_step until the loss has left ln K without the queue "
                "(SwAV: epoch 15), or shorten method.queue_length",
                "queued features of an untrained network outnumber the batch",
            )
        if stuck and entropy > 0.98 * ln_k:
            return Verdict(
                "uniform collapse",
                f"assignments are uniform: loss {loss:.3f} and assignment entropy {entropy:.3f} "
                f"are at ln {k} = {ln_k:.3f}",
                remedy,
                "assignments too soft for features that are still alike, or prototypes that moved "
                "before the features did",
            )
        if stuck:
            return Verdict(
                "not learning",
                f"the loss {loss:.3f} is not below ln {k} = {ln_k:.3f}: views do not predict each "
                "other's assignments yet",
                remedy,
                "views with too little in common, or prototypes that move faster than the features",
            )
        if used < 0.1:
            return Verdict(
                "dead prototypes",
                f"only {used:.0%} of prototypes are nearest to any sample",
                "use fewer method.prototypes, or a longer method.freeze_prototypes_steps",
                "more prototypes than the images have kinds, or than a batch has samples",
            )
        return Verdict(
            "healthy", f"loss {loss:.3f} below ln {k} = {ln_k:.3f}, {used:.0%} of prototypes used"
        )
