"""Linear classifiers on one or several vectors of a trunk."""

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor


class LinearClassifier(nn.Module):
    """Optional hidden layer, optional BatchNorm, dropout, and a linear layer.

    Args:
        width: of the vector.
        classes: number of them.
        batch_norm: an affine BatchNorm before the linear layer, as VISSL's probes have.
        dropout: share of the channels that are dropped.
        hidden: width of a layer before, with ReLU: SEER's low-shot classifiers keep the first layer
            of the pretraining head. None: no such layer.
        hidden_norm: that layer has BatchNorm.

    Linear weights begin as N(0, 0.01), biases as 0. Shapes: (b, width) -> (b, classes).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
        hidden: int | None = None,
        hidden_norm: bool = False,
    ) -> None:
        super().__init__()
        # numbered as in `ProjectionHead`, whose first layer may be taken over
        layers: list[nn.Module] = []
        if hidden is not None:
            layers.append(nn.Linear(width, hidden))
            layers += [nn.BatchNorm1d(hidden)] if hidden_norm else []
            layers.append(nn.ReLU())
        self.hidden = nn.Sequential(*layers)
        last = hidden or width
        self.norm = nn.BatchNorm1d(last) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(last, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(self.hidden(vectors))))


class Classifiers(nn.Module):
    """A classifier on each of several vectors: {name: (b, width)} -> {name: (b, classes)}."""

    def __init__(self, heads: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(dict(heads))

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.heads[name](vector) for name, vector in vectors.items()}
