"""What DINO and iBOT share: a student that is trained, and a teacher that is its moving average.

DINO: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers"
(arXiv:2104.14294).

Differences from the released code (facebookresearch/dino):
- The centre and Sinkhorn see the whole global batch, under gradient accumulation too.
- The teacher's temperature is warmed up per update; there, per epoch.
- Where a number is not finite, neither student, teacher nor centre moves, on any rank; there, the
  run ends.
The teacher's BatchNorm, where a trunk has it, works on the statistics of its own batches, as there.

Drop path is drawn per rank and micro-batch (seeded by both), so with it the same images on another
number of ranks are another draw.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.ops import StochasticDepth

from selfsight.heads.dino_head import DinoHead
from selfsight.losses.targets import entropy, participation
from selfsight.methods.method import Method, Now, Verdict
from selfsight.optim.ema import move_average
from selfsight.schedules import cosine, warmup_constant
from selfsight.trunks.trunk import Trunk


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy with the same weights that takes no gradient and drops no path."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return teacher


class TeacherStudent(Method):
    """Base of the methods whose teacher is the student's average.

    Args:
        trunk: The student's; a copy becomes the teacher's.
        heads: The student's heads by name; copies become the teacher's.
        student_temperature: Of the softmax of the student's scores.
        teacher_temperature: Of the teacher's, after the warm-up.
        teacher_temperature_start: At step 0.
        teacher_temperature_warmup_steps: From the one to the other, in a line.
        teacher_momentum: Share that the teacher keeps at step 0; it rises to 1 by a cosine over the
            run, and stays where it is in a run without end.
        freeze_last_layer_steps: The heads' last layers receive no update for so many steps.

    Attributes:
        trunk: The teacher's trunk, which is evaluated and exported.
        heads: The teacher's heads.
        student_trunk: What is trained.
        student_heads: What is trained.

    Raises:
        ValueError: a temperature or momentum that cannot be.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        heads: Mapping[str, DinoHead],
        student_temperature: float,
        teacher_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature_warmup_steps: int,
        teacher_momentum: float,
        freeze_last_layer_steps: int,
    ) -> None:
        super().__init__()
        if min(student_temperature, teacher_temperature, teacher_temperature_start) <= 0:
            raise ValueError("the temperatures under method must be above 0")
        if not 0 <= teacher_momentum <= 1:
            raise ValueError(f"method.teacher_momentum={teacher_momentum} must be from 0 to 1")
        self.student_trunk = trunk
        self.student_heads = nn.ModuleDict(heads)
        copied = teacher_of(trunk)
        assert isinstance(copied, Trunk)
        self.trunk = copied
        self.heads = nn.ModuleDict({name: teacher_of(head) for name, head in heads.items()})
        self.student_temperature = student_temperature
        self.temperatures = (teacher_temperature_start, teacher_temperature)
        self.temperature_warmup = teacher_temperature_warmup_steps
        self.teacher_momentum = teacher_momentum
        self.freeze_last_layer_steps = freeze_last_layer_steps

    def require_bounded_scores(self, centring: str) -> None:
        """Sinkhorn exponentiates scores, which must be cosines.

        Raises:
            ValueError: the norms of the prototypes are learnt.
        """
        learnt = [h for h in self.student_heads.values() if not h.frozen_norm]
        if centring == "sinkhorn" and learnt:
            raise ValueError(
                "method.centring=sinkhorn needs prototypes of unit length: set "
                "method.head.frozen_norm=true, or method.centring=centre"
            )

    # ----------------------------------------------------------------------------- contract

    @property
    def trainable_trunk(self) -> Trunk:
        return self.student_trunk

    def units(self) -> list[nn.Module]:
        return [*self.student_trunk.units(), *self.trunk.units()]

    def compile_units(self) -> list[nn.Module]:
        return [*self.student_trunk.compile_units(), *self.trunk.compile_units()]

    @property
    def warmup_steps(self) -> int:
        return self.freeze_last_layer_steps

    def scaling(self, batch_size: int) -> str:
        start, end = self.temperatures
        warm = f"{start:g} -> {end:g} over {self.temperature_warmup} updates"
        return (
            f"teacher at {batch_size} images an update: momentum {self.teacher_momentum:.6g} -> 1, "
            f"temperature {warm if start != end else f'{end:g}'}; last layer frozen for "
            f"{self.freeze_last_layer_steps} updates"
        )

    def momentum(self, now: Now) -> float:
        """Share that the teacher keeps at this update."""
        if now.steps is None:
            return self.teacher_momentum
        return cosine(now.step, start=self.teacher_momentum, end=1.0, steps=now.steps)

    def temperature(self, now: Now) -> float:
        """Of the teacher, at this update."""
        start, peak = self.temperatures
        return warmup_constant(
            now.step, start=start, peak=peak, warmup_steps=self.temperature_warmup
        )

    # ------------------------------------------------------------------------ around the update

    def after_backward(self, now: Now) -> None:
        if now.step < self.freeze_last_layer_steps:
            for head in self.student_heads.values():
                assert isinstance(head, DinoHead)
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # the optimiser skips it: no moments, no weight decay

    def follow(self, now: Now, ok: Tensor) -> None:
        """Move the teacher, if `ok`."""
        momentum = self.momentum(now)
        move_average(self.trunk, self.student_trunk, momentum, ok)
        move_average(self.heads, self.student_heads, momentum, ok)

    # ------------------------------------------------------------------------------ figures

    @torch.no_grad()
    def measure(
        self, now: Now, loss: Tensor, targets: Tensor, features: Tensor, centre: Tensor
    ) -> dict[str, Tensor]:
        """Figures that tell health from collapse, on the device and without synchronisation.

        Args:
            now: The update.
            loss: Cross-entropy of predictions and targets.
            targets: (A, b, K) of the teacher.
            features: (A * b, width) of the teacher's trunk.
            centre: (K).
        """
        teacher_entropy = entropy(targets)
        unit = nn.functional.normalize(features.float(), dim=-1)
        return {
            "teacher_entropy": teacher_entropy,
            "kl": loss.detach() - teacher_entropy,
            "centre_norm": centre.norm(),
            "feature_rank": participation(features),
            "feature_spread": (1 - unit.mean(dim=0).square().sum()).clamp(min=0).sqrt(),
            "teacher_temperature": torch.full_like(teacher_entropy, self.temperature(now)),
            "teacher_momentum": torch.full_like(teacher_entropy, self.momentum(now)),
            "target_mass": targets.sum(dim=(0, 1)),
        }

    def figures(self, means: Mapping[str, float], sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Adds the entropy of the mean target since the last log line, and its exponential: how
        many prototypes the targets use."""
        shares = sums["target_mass"].double()
        shares = shares / shares.sum().clamp(min=1e-300)
        spread = -torch.special.xlogy(shares, shares).sum().item()
        return {**means, "mean_target_entropy": spread, "prototypes_used": math.exp(spread)}

    def scores(self, features: Tensor) -> Tensor:
        """The teacher's, of its first head."""
        return next(iter(self.heads.values()))(features)

    def diagnose(self, figures: Mapping[str, float], now: Now) -> Verdict:
        """Name a collapse (DINO, section 5.3): targets that tell nothing apart (`uniform`: the
        entropy is ln K) or are one and the same (`one-point`: it is 0); in both the KL divergence
        of student and teacher is about 0."""
        k = next(iter(self._head_sizes()))
        ln_k = math.log(k)
        entropy_, kl = figures["teacher_entropy"], figures["kl"]
        spread, used = figures["mean_target_entropy"], figures["prototypes_used"]
        sizes = (
            f"teacher entropy {entropy_:.3f} of ln {k} = {ln_k:.3f}, KL {kl:.3f}, "
            f"{used:.1f} prototypes used, feature rank {figures['feature_rank']:.1f}"
        )
        if spread < 0.1 * ln_k:
            return Verdict(
                "one-point collapse",
                f"all images have the same target: {sizes}",
                "let the centre follow (method.centring=centre, method.centre_momentum=0.9), or "
                "use method.centring=sinkhorn; a lower schedule.base_lr, or a longer "
                "method.freeze_last_layer_steps",
            )
        if entropy_ > 0.98 * ln_k and kl < 0.02 * ln_k:
            return Verdict(
                "uniform collapse",
                f"targets tell nothing apart: {sizes}",
                "sharpen the teacher: method.teacher_temperature=0.04, at most 0.07, with a longer "
                "method.teacher_temperature_warmup_steps; or a lower schedule.base_lr",
            )
        if figures["feature_spread"] < 0.01:
            return Verdict(
                "one-point collapse",
                f"all features are alike (spread {figures['feature_spread']:.4f} of 1): {sizes}",
                "a lower schedule.base_lr, or a larger method.teacher_momentum",
            )
        return Verdict("healthy", sizes)

    def _head_sizes(self) -> Sequence[int]:
        return [int(head.prototypes) for head in self.heads.values()]  # type: ignore[arg-type]
