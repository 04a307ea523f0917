"""Small DINO and iBOT methods for tests, batches, and DINO's loss as the paper writes it, in
float64."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.batch import Batch
from selfsight.heads.dino_head import DinoHead
from selfsight.methods.dino import DINO
from selfsight.methods.ibot import IBOT
from selfsight.methods.method import Now
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer

NOW = Now(step=0, steps=10)
HEAD = partial(DinoHead, hidden=24, bottleneck=16, prototypes=40)


def regnet() -> RegNetY:
    return RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)


def vit(**options: Any) -> VisionTransformer:
    options = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 2, **options}
    return VisionTransformer(**options)


def dino(trunk=None, head=HEAD, **options: Any) -> DINO:
    """A method whose teacher differs from its student, so that tests can tell them apart."""
    torch.manual_seed(0)
    method = DINO(trunk=trunk or vit(), head=head, **options)
    return part(method)


def ibot(trunk=None, head=HEAD, **options: Any) -> IBOT:
    torch.manual_seed(0)
    return part(IBOT(trunk=trunk or vit(mask_token=True), head=head, **options))


def part(method):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (method.trunk, method.heads):
            for p in module.parameters():
                if p.ndim > 1 and p.shape[-1] > 1:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return method


def a_batch(n=8, sizes=((2, 32), (3, 16)), seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = [
        torch.randint(0, 256, (count, n, 3, s, s), generator=generator, dtype=torch.uint8)
        for count, s in sizes
    ]
    return Batch(views, torch.arange(n) + 100 * seed, torch.full((n,), -1))


def head_in_float64(head: Any, features: Tensor) -> Tensor:
    """MLP with GELU, unit length, and unit prototypes times their norms."""
    x = features.double()
    layers = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        x = x @ layer.weight.double().T + layer.bias.double()
        if i < len(layers) - 1:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    v = head.last_layer.weight_v.double()
    rows = v / v.square().sum(1, keepdim=True).sqrt() * head.last_layer.weight_g.double()
    return x @ rows.T


def scores_in_float64(method: DINO | IBOT, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Scores (b, K) of the student for each view, and of the teacher for each global view."""
    student: list[Tensor] = []
    for views in batch.views:
        for view in views:
            features = method.student_trunk(method.normalize_pixels(view))
            student.append(head_in_float64(method.student_heads["image"], features))
    teacher = [
        head_in_float64(method.heads["image"], method.trunk(method.normalize_pixels(view)))
        for view in batch.views[0]
    ]
    return student, [t.detach() for t in teacher]


def loss_in_float64(
    student: list[Tensor], targets: list[Tensor], temperature: float = 0.1
) -> Tensor:
    """The mean over pairs of different views of the cross-entropy (equation 3 of the paper)."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for a, target in enumerate(targets):
        for v, scores in enumerate(student):
            if v != a:
                total = total - (target * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()
                pairs += 1
    return total / pairs


def trainable(method: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in method.parameters() if p.requires_grad]
