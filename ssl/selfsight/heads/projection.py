"""Projection head: a multi-layer perceptron from trunk features to the space where views meet.

SwAV's has BatchNorm between its layers, SEER's largest trunks go without (VISSL, `swav_head`).
"""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor


class ProjectionHead(nn.Module):
    """Linear layers of the given widths with ReLU between them.

    Args:
        widths: Channels from the trunk's features to the output, e.g. `[2048, 2048, 128]`.
        batch_norm: BatchNorm before each ReLU. Linear layers keep their bias either way, as in the
            released heads.

    Layers are numbered like VISSL's `projection_head.{0,2,4}` (or `{0,1,3,4,6}` with BatchNorm),
    so that published heads load by name.

    Shapes: (b, widths[0]) -> (b, widths[-1]), not normalised.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, *, widths: Sequence[int], batch_norm: bool = True) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"a projection head needs at least two widths, not {list(widths)}")
        self.in_width, self.width = widths[0], widths[-1]
        layers: list[nn.Module] = []
        for index in range(len(widths) - 1):
            layers.append(nn.Linear(widths[index], widths[index + 1]))
            if index < len(widths) - 2:
                if batch_norm:
                    layers.append(nn.BatchNorm1d(widths[index + 1]))
                layers.append(nn.ReLU(inplace=True))
        self.projection_head = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection_head(features)
