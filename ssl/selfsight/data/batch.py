"""What one step of training is fed: the views of one batch, grouped by crop size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """The images of one rank in one step.

    Attributes:
        views: one uint8 tensor a crop group (uint16 for images of 16 bits), in the order of the
            config, of shape (count, b, channels, size, size): `count` views of each of `b` images.
            Memory is channels last.
        positions: int64 (b,), the position of each sample in the global stream.
        labels: int64 (b,), -1 where the source has none.
        colour: what is left to do to the views of each group, rows of `photometric_batch.pack`
            (count, b, columns) on the host; empty where the views are done.
        on_host: the positions on the host, where `positions` are on another device; see `places`.
    """

    views: list[Tensor]
    positions: Tensor
    labels: Tensor
    colour: list[np.ndarray] = field(default_factory=list)
    on_host: Tensor | None = None

    @property
    def places(self) -> list[int]:
        """The positions as numbers; it waits for the device only where `on_host` is missing."""
        return (self.positions if self.on_host is None else self.on_host).tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def micro(self, parts: int) -> list[Batch]:
        """Cut the batch along its images into `parts` equal slices (views of the same memory)."""
        if len(self) % parts:
            raise ValueError(
                f"{len(self)} images a rank cannot be cut into {parts} equal micro-batches: "
                "choose a number of accumulation steps that divides the images per rank."
            )
        step = len(self) // parts
        return [
            Batch(
                views=[view[:, i : i + step] for view in self.views],
                positions=self.positions[i : i + step],
                labels=self.labels[i : i + step],
                colour=[rows[:, i : i + step] for rows in self.colour],
                on_host=None if self.on_host is None else self.on_host[i : i + step],
            )
            for i in range(0, len(self), step)
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Copy what are tensors to `device`; it does not block where the memory allows it."""
        return Batch(
            views=[view.to(device, non_blocking=True) for view in self.views],
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            colour=self.colour,
            on_host=self.positions if self.on_host is None else self.on_host,
        )
