"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294).

The student sees all crops, the teacher the first group (the global ones); each crop of the student
predicts the teacher's target of every other crop. How it differs from the released code is said in
`teacher_student.py`. Trunks that can (ViTs) take all crops in one pass.

Shapes: A crops of the teacher, V views of one size, b samples of this rank or micro-batch, K
prototypes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.heads.dino_head import DinoHead
from selfsight.losses.koleo import koleo_loss
from selfsight.losses.swapped_prediction import swapped_prediction_loss
from selfsight.losses.targets import Targets
from selfsight.methods.method import Now
from selfsight.methods.teacher_student import TeacherStudent
from selfsight.trunks.trunk import Trunk


class DINO(TeacherStudent):
    """Self-distillation.

    Args:
        trunk: Gives (n, trunk.width) features of images.
        head: Makes a head for features of `in_width`.
        student_temperature: Of the softmax of the student's scores.
        teacher_temperature: Of the teacher's, after the warm-up.
        teacher_temperature_start: At step 0.
        teacher_temperature_warmup_steps: From the one to the other, in a line.
        teacher_momentum: Share that the teacher keeps at step 0; it rises to 1 by a cosine.
        centring: What keeps targets from collapse: `centre`, `sinkhorn`, or `none` for experiments.
        centre_momentum: Share that the centre keeps at each update.
        sinkhorn_iterations: Normalisations of Sinkhorn.
        freeze_last_layer_steps: The head's last layer receives no update for so many steps.
        koleo_weight: Of the KoLeo loss of the student's features of each global crop; 0 for none.

    Raises:
        ValueError: a value that cannot be, or Sinkhorn with prototypes whose norms are learnt.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        head: Callable[..., DinoHead],
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup_steps: int = 0,
        teacher_momentum: float = 0.996,
        centring: str = "centre",
        centre_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
        freeze_last_layer_steps: int = 0,
        koleo_weight: float = 0.0,
    ) -> None:
        built = head(in_width=trunk.width)
        super().__init__(
            trunk=trunk,
            heads={"image": built},
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            teacher_temperature_start=teacher_temperature_start,
            teacher_temperature_warmup_steps=teacher_temperature_warmup_steps,
            teacher_momentum=teacher_momentum,
            freeze_last_layer_steps=freeze_last_layer_steps,
        )
        self.targets = Targets(
            built.prototypes,
            centring=centring,
            momentum=centre_momentum,
            iterations=sinkhorn_iterations,
        )
        self.require_bounded_scores(centring)
        self.koleo_weight = koleo_weight
        if (token := getattr(trunk, "mask_token", None)) is not None:
            token.requires_grad_(False)  # nothing is masked here

    # ------------------------------------------------------------------------------- forward

    def forward(
        self, batch: Batch, now: Now, plan: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        views = [self.normalize_pixels(v) for v in batch.views]
        if plan is None:
            scores, seen = self.teach(views[0])
            targets = self.targets(
                scores.unflatten(0, batch.views[0].shape[:2]), self.temperature(now)
            )
        else:
            targets, seen = plan
        features = self.student_trunk.forward_views(views)  # [size] (V * b, width)
        scores = self.student_heads["image"](torch.cat(features))
        by_view = [
            part.unflatten(0, v.shape[:2])
            for part, v in zip(scores.split([len(f) for f in features]), batch.views, strict=True)
        ]
        loss = swapped_prediction_loss(
            by_view, targets, temperature=self.student_temperature, assign=range(len(targets))
        )
        metrics = self.measure(now, loss, targets, seen, self.targets.centre)
        if self.koleo_weight:
            crops = features[0].unflatten(0, batch.views[0].shape[:2])
            koleo = torch.stack([koleo_loss(crop) for crop in crops]).sum()
            metrics["koleo"] = koleo.detach() / len(crops)
            loss = loss + self.koleo_weight * koleo
        return loss, metrics

    @torch.no_grad()
    def teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's scores (n, K) and features (n, width) of normalised images."""
        features = self.trunk(images)
        return self.heads["image"](features), features

    @torch.no_grad()
    def plan(
        self, micro_batches: Sequence[Batch], now: Now
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Targets (A, b, K) and the teacher's features of each micro-batch, where targets depend on
        the whole batch. The teacher's pass is not repeated."""
        if not self.targets.needs_whole_batch:
            return [None] * len(micro_batches)
        scores: list[Tensor] = []
        seen: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            now.reseed(index)
            found, features = self.teach(self.normalize_pixels(batch.views[0]))
            scores.append(found.unflatten(0, batch.views[0].shape[:2]))
            seen.append(features)
        targets = self.targets(torch.cat(scores, dim=1), self.temperature(now))
        sizes = [len(batch) for batch in micro_batches]
        return list(zip(targets.split(sizes, dim=1), seen, strict=True))

    # ------------------------------------------------------------------------ around the update

    @torch.no_grad()
    def after_step(self, now: Now, ok: Tensor) -> None:
        self.targets.follow(ok)
        self.follow(now, ok)
