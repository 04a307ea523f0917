"""The contract of a pretraining method.

A method owns its trunk and heads, and turns a batch of views into a loss. The loop drives it:

    for each update:
        plan = method.plan(micro_batches, now)          only when a step is accumulated
        for micro_batch, part in ...:
            loss, metrics = method(micro_batch, now, part)
            (backward)
        method.after_backward(now)
        (optimizer step)
        method.after_step(now, ok)

A new method is one file beside this one and one yaml in `conf/method`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.trunks.trunk import Trunk


@dataclass(frozen=True)
class Now:
    """Where the run stands: the update's number and the values its schedules have now."""

    step: int
    steps: int | None
    values: Mapping[str, float] = field(default_factory=dict)
    reseed: Callable[[int], None] = lambda _: None
    """`reseed(i)` sets the random state of micro-batch i of this update; the loop calls it before
    each forward pass, and `plan` must too, so that both passes draw the same dropout masks."""


@dataclass(frozen=True)
class Verdict:
    """The state of a run in words: `healthy`, `warming up`, `uniform collapse`, ..."""

    state: str
    sentence: str
    remedy: str = ""
    cause: str = ""
    """What is likely behind it."""


class Method(nn.Module, ABC):
    """Base of all methods. Everything a resume needs lies in parameters and buffers from the
    constructor on; no buffer may differ between ranks (DDP keeps one rank's copy)."""

    trunk: Trunk
    """The trunk that evaluation and export use: with a teacher, the teacher's."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, default in (
            ("pixel_mean", (0.485, 0.456, 0.406)),
            ("pixel_std", (0.229, 0.224, 0.225)),
        ):
            self.register_buffer(name, torch.tensor(default).view(1, -1, 1, 1))

    def set_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the channel means and standard deviations of pixels in [0, 1]."""
        device = self.pixel_mean.device
        self.pixel_mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.pixel_std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def normalize_pixels(self, images: Tensor) -> Tensor:
        """uint8 or uint16 (..., c, h, w) -> normalised float32 (n, c, h, w), channels last."""
        flat = images.reshape(-1, *images.shape[-3:])
        floats = flat.to(torch.float32, memory_format=torch.channels_last)
        white = 255 if images.dtype == torch.uint8 else 65535
        return floats.div_(white).sub_(self.pixel_mean).div_(self.pixel_std)

    @property
    def trainable_trunk(self) -> Trunk:
        """The trunk that the optimiser trains; with a teacher it is not the one evaluated."""
        return self.trunk

    def units(self) -> list[nn.Module]:
        """The blocks that activation checkpointing repeats and FSDP2 shards, of all trunks."""
        return self.trunk.units()

    def compile_units(self) -> list[nn.Module]:
        """The modules to compile, of all trunks."""
        return self.trunk.compile_units()

    def scaling(self, batch_size: int) -> str:
        """What of the method follows from the size of the batch or the length of the run, in words
        for the console; empty if nothing does."""
        return ""

    @property
    def warmup_steps(self) -> int:
        """Updates during which the method is expected to learn little."""
        return 0

    @abstractmethod
    def forward(self, batch: Batch, now: Now, plan: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch (a mean over its samples) and figures to log.

        Args:
            batch: Views as uint8, on the method's device.
            now: Step and scheduled values.
            plan: This micro-batch's part of what `plan` returned, or None if the micro-batch is
                this rank's whole share of the step.

        Returns:
            The loss, a scalar; and detached figures. Scalars are averaged over micro-batches,
            ranks and the updates of a log line; tensors of more dimensions are summed.
        """

    def plan(self, micro_batches: Sequence[Batch], now: Now) -> Sequence[Any]:
        """A first pass without gradient over all micro-batches of an accumulated step.

        For what needs the whole global batch at once. Runs with batch statistics and leaves
        running ones untouched. The default needs nothing.
        """
        return [None] * len(micro_batches)

    def after_backward(self, now: Now) -> None:
        """Change gradients before the update, e.g. drop those of what is frozen."""

    def after_step(self, now: Now, ok: Tensor) -> None:
        """Follow the update: renormalise, move an average, fill a queue.

        Args:
            ok: A boolean scalar on the device, false where the update was skipped because a
                number was not finite: then nothing may be learnt from this step.
        """

    def figures(self, means: Mapping[str, float], sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What is logged, from averaged scalars and summed tensors (on the CPU)."""
        return dict(means)

    def scores(self, features: Tensor) -> Tensor | None:
        """Scores of the trunk's features (n, width) against the method's prototypes, (n, K), for
        pictures of them; None where there are none. Called in evaluation mode, without gradient."""
        return None

    def diagnose(self, figures: Mapping[str, float], now: Now) -> Verdict:
        """The state of the run in words, from the figures of one log line."""
        return Verdict("healthy", "the loss is finite")

    def explain_spike(self, step: int) -> Verdict | None:
        """What it means for this method that the loss jumped at `step`; None: nothing special."""
        return None
