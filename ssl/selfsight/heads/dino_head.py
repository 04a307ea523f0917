"""DINO's projection head (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
Transformers", arXiv:2104.14294, section 3 and appendix C), also that of iBOT and DINOv2.

Parameter names are those of the released heads: `mlp.{0,2,4}`, `last_layer.weight_{g,v}`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.precision import full_precision


class DinoHead(nn.Module):
    """Features to scores of prototypes: an MLP, unit length, and a layer of unit vectors.

    The scores are cosines times each prototype's norm, computed in true float32 whatever the
    autocast precision: the teacher's are divided by 0.04.

    Args:
        in_width: length of the trunk's features.
        hidden: width of the hidden layers.
        layers: linear layers of the MLP, the last one to `bottleneck`; GELU between them.
        bottleneck: length of what is compared with the prototypes.
        prototypes: number K of scores.
        frozen_norm: the prototypes' norms stay 1. If not, they are learnt: better for a ViT-S, and
            less stable (DINO's README).

    Shapes: (b, in_width) -> (b, prototypes), float32.

    Raises:
        ValueError: no layer, or fewer than two prototypes.
    """

    def __init__(
        self,
        *,
        in_width: int,
        hidden: int = 2048,
        layers: int = 3,
        bottleneck: int = 256,
        prototypes: int = 65536,
        frozen_norm: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1 or prototypes < 2:
            raise ValueError(
                f"a DINO head needs at least 1 layer and 2 prototypes, not {layers} and "
                f"{prototypes}: set method.head.layers and method.head.prototypes"
            )
        self.in_width, self.prototypes, self.frozen_norm = in_width, prototypes, frozen_norm
        widths = [in_width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for index in range(layers):
            parts.append(nn.Linear(widths[index], widths[index + 1]))
            if index < layers - 1:
                parts.append(nn.GELU())
        self.mlp = nn.Sequential(*parts)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = NormedLinear(bottleneck, prototypes, frozen_norm=frozen_norm)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features).float(), dim=-1))


class NormedLinear(nn.Module):
    """A linear layer without bias whose rows are `weight_g` * unit(`weight_v`): weight
    normalisation (Salimans and Kingma 2016, arXiv:1602.07868) with two plain parameters.

    (..., width) float32 -> (..., count) float32. The norms start at 1.
    """

    def __init__(self, width: int, count: int, *, frozen_norm: bool) -> None:
        super().__init__()
        direction = nn.Linear(width, count, bias=False).weight  # PyTorch's default, as DINO
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not frozen_norm)
        self.weight_v = nn.Parameter(direction.detach())

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            v = self.weight_v.float()
            weight = v * (self.weight_g.float() / v.norm(dim=1, keepdim=True))
            return F.linear(x, weight)
