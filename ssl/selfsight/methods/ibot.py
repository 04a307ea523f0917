"""iBOT: DINO, and the same for patches that the student does not see (Zhou et al. 2022, "iBOT:
Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832). With Sinkhorn, KoLeo and heads of
their own it is the loss of DINOv2 (Oquab et al. 2023, arXiv:2304.07193).

Differences from the released codes, beside those of `teacher_student.py`:
- Which patches are masked depends on seed, sample and crop alone (`data/block_masks.py`).
- The centre of patches is the mean over all masked patches of the global batch, not a mean of the
  ranks' means.
- KoLeo looks for neighbours on all ranks; DINOv2 on each GPU. Under gradient accumulation, within
  the micro-batch.

Shapes: A global crops, V views of one size, b samples of this rank or micro-batch, n patches of a
global crop, m masked ones of all A * b crops, K prototypes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.data.block_masks import block_masks
from selfsight.heads.dino_head import DinoHead
from selfsight.losses.koleo import koleo_loss
from selfsight.losses.masked_prediction import masked_prediction_loss
from selfsight.losses.swapped_prediction import swapped_prediction_loss
from selfsight.losses.targets import Targets, entropy
from selfsight.methods.method import Now
from selfsight.methods.teacher_student import TeacherStudent
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vit import VisionTransformer


@dataclass
class Masked:
    """The masked patches of a micro-batch, on its device.

    Attributes:
        masks: bool (A * b, n).
        index: int64 (m), places of the masked patches in the patches of all crops, flattened.
        weights: (m), one over the number of masked patches of the patch's crop.
    """

    masks: Tensor
    index: Tensor
    weights: Tensor


@dataclass
class Taught:
    """What the teacher says of a micro-batch.

    Attributes:
        image: (A, b, K) scores, then targets, of the class tokens.
        patches: (m, K) scores, then targets, of the masked patches.
        features: (A * b, width) class tokens.
    """

    image: Tensor
    patches: Tensor
    features: Tensor


class IBOT(TeacherStudent):
    """Self-distillation of images and of masked patches, with a ViT.

    Args:
        trunk: A VisionTransformer with a mask token.
        head: Makes a head for features of `in_width`.
        patch_head: Makes the head of patches; None: they share that of images.
        student_temperature: Of the softmax of the student's scores.
        teacher_temperature: Of the teacher's, after the warm-up.
        teacher_temperature_start: At step 0.
        teacher_temperature_warmup_steps: From the one to the other, in a line.
        teacher_momentum: Share that the teacher keeps at step 0; it rises to 1 by a cosine.
        centring: What keeps targets from collapse: `centre`, `sinkhorn`, or `none`.
        centre_momentum: Share that the centres keep at each update.
        sinkhorn_iterations: Normalisations of Sinkhorn.
        freeze_last_layer_steps: The heads' last layers receive no update for so many steps.
        koleo_weight: Of the KoLeo loss of the student's class tokens of each global crop.
        patch_weight: Of the loss of masked patches.
        mask_share: Probability that a global crop is masked.
        mask_ratio: Range of the share of its patches that is then masked.
        mask_seed: Of the masks; the run's.

    Raises:
        ValueError: the trunk is no ViT with a mask token, or a value cannot be.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        head: Callable[..., DinoHead],
        patch_head: Callable[..., DinoHead] | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup_steps: int = 0,
        teacher_momentum: float = 0.992,
        centring: str = "sinkhorn",
        centre_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
        freeze_last_layer_steps: int = 0,
        koleo_weight: float = 0.1,
        patch_weight: float = 1.0,
        mask_share: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_seed: int = 0,
    ) -> None:
        if not isinstance(trunk, VisionTransformer) or trunk.mask_token is None:
            raise ValueError(
                "method=ibot masks patches, which needs a ViT with a mask token: choose "
                "model=vit_... and model.trunk.mask_token=true, or method=dino for other trunks"
            )
        if not (0 <= mask_share <= 1 and 0 < mask_ratio[0] <= mask_ratio[1] < 1):
            raise ValueError(
                f"method.mask_share={mask_share} must be from 0 to 1 and method.mask_ratio="
                f"{list(mask_ratio)} two increasing numbers between 0 and 1"
            )
        heads = {"image": head(in_width=trunk.width)}
        if patch_head is not None:
            heads["patch"] = patch_head(in_width=trunk.width)
        super().__init__(
            trunk=trunk,
            heads=heads,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            teacher_temperature_start=teacher_temperature_start,
            teacher_temperature_warmup_steps=teacher_temperature_warmup_steps,
            teacher_momentum=teacher_momentum,
            freeze_last_layer_steps=freeze_last_layer_steps,
        )
        self.patch_head = "image" if patch_head is None else "patch"
        self.targets, self.patch_targets = (
            Targets(
                heads[name].prototypes,
                centring=centring,
                momentum=centre_momentum,
                iterations=sinkhorn_iterations,
            )
            for name in ("image", self.patch_head)
        )
        self.require_bounded_scores(centring)
        self.koleo_weight, self.patch_weight = koleo_weight, patch_weight
        self.mask_share, self.mask_seed = mask_share, mask_seed
        self.mask_ratio = (mask_ratio[0], mask_ratio[1])

    # ------------------------------------------------------------------------------- forward

    def forward(
        self, batch: Batch, now: Now, plan: Taught | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        masked = self.mask(batch)
        views = [self.normalize_pixels(v) for v in batch.views]
        if plan is None:
            plan = self.teach(batch, views[0], masked)
            self._sharpen(plan, now)
        trunk = self.student_trunk
        assert isinstance(trunk, VisionTransformer)
        tokens = trunk.tokens_views(views, masked.masks)  # [size] (V * b, prefix + n, width)
        images = [t[:, 0] for t in tokens]
        patches = self._select(tokens[0], masked)
        scores = self.student_heads["image"](torch.cat(images))
        by_view = [
            part.unflatten(0, v.shape[:2])
            for part, v in zip(scores.split([len(t) for t in images]), batch.views, strict=True)
        ]
        image_loss = swapped_prediction_loss(
            by_view, plan.image, temperature=self.student_temperature, assign=range(len(plan.image))
        )
        patch_loss = masked_prediction_loss(
            self.student_heads[self.patch_head](patches),
            plan.patches,
            masked.weights,
            images=len(masked.masks),
            temperature=self.student_temperature,
        )
        loss = image_loss + self.patch_weight * patch_loss
        metrics = self.measure(now, image_loss, plan.image, plan.features, self.targets.centre)
        metrics["image_loss"], metrics["patch_loss"] = image_loss.detach(), patch_loss.detach()
        metrics["patch_entropy"] = entropy(plan.patches)
        metrics["masked_share"] = masked.masks.float().mean()
        if self.koleo_weight:
            crops = images[0].unflatten(0, batch.views[0].shape[:2])
            koleo = torch.stack([koleo_loss(crop) for crop in crops]).sum()
            metrics["koleo"] = koleo.detach() / len(crops)
            loss = loss + self.koleo_weight * koleo
        return loss, metrics

    def mask(self, batch: Batch) -> Masked:
        """The masked patches of the batch's global crops; made on the host, without waiting for the
        device."""
        crops, _, _, height, width = batch.views[0].shape
        assert isinstance(self.trunk, VisionTransformer)
        patch = self.trunk.patch_size
        masks = block_masks(
            batch.places,
            crops,
            (height // patch, width // patch),
            seed=self.mask_seed,
            share=self.mask_share,
            ratio=self.mask_ratio,
        )
        masks = masks.reshape(-1, masks.shape[-1])
        counts = masks.sum(axis=1)
        weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
        device = batch.views[0].device
        return Masked(
            *(
                torch.from_numpy(array).to(device, non_blocking=True)
                for array in (masks, np.flatnonzero(masks), weights)
            )
        )

    @torch.no_grad()
    def teach(self, batch: Batch, images: Tensor, masked: Masked) -> Taught:
        """The teacher's scores of normalised images, of which it sees every patch."""
        assert isinstance(self.trunk, VisionTransformer)
        tokens = self.trunk.tokens(images)
        features = tokens[:, 0]
        return Taught(
            self.heads["image"](features).unflatten(0, batch.views[0].shape[:2]),
            self.heads[self.patch_head](self._select(tokens, masked)),
            features,
        )

    @torch.no_grad()
    def plan(self, micro_batches: Sequence[Batch], now: Now) -> Sequence[Taught | None]:
        """What the teacher says of each micro-batch, where targets depend on the whole batch. The
        teacher's pass is not repeated."""
        if not self.targets.needs_whole_batch:
            return [None] * len(micro_batches)
        taught: list[Taught] = []
        for index, batch in enumerate(micro_batches):
            now.reseed(index)
            images = self.normalize_pixels(batch.views[0])
            taught.append(self.teach(batch, images, self.mask(batch)))
        whole = Taught(
            torch.cat([t.image for t in taught], dim=1),
            torch.cat([t.patches for t in taught]),
            taught[0].features,
        )
        self._sharpen(whole, now)
        images = whole.image.split([t.image.shape[1] for t in taught], dim=1)
        patches = whole.patches.split([len(t.patches) for t in taught])
        return [
            Taught(image, patch, t.features)
            for image, patch, t in zip(images, patches, taught, strict=True)
        ]

    def _sharpen(self, taught: Taught, now: Now) -> None:
        """Scores to targets."""
        temperature = self.temperature(now)
        taught.image = self.targets(taught.image, temperature)
        taught.patches = self.patch_targets(taught.patches, temperature)

    def _select(self, tokens: Tensor, masked: Masked) -> Tensor:
        """(A * b, prefix + n, width) to the masked patches (m, width)."""
        assert isinstance(self.trunk, VisionTransformer)
        patches = tokens[:, self.trunk.prefix_tokens :].flatten(0, 1)
        return patches.index_select(0, masked.index)

    # ------------------------------------------------------------------------ around the update

    @torch.no_grad()
    def after_step(self, now: Now, ok: Tensor) -> None:
        self.targets.follow(ok)
        self.patch_targets.follow(ok)
        self.follow(now, ok)
