"""Which parameters decay."""

import pytest
import torch
from torch import nn

from selfsight.optim.adamw import AdamW
from selfsight.optim.gradients import gradient_norm
from selfsight.optim.groups import lr_factors, parameter_groups, set_hyperparameters
from selfsight.optim.lars import LARS
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.vit import VisionTransformer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)


NAMES = ["token", "scale", "conv.weight", "conv.bias", "bn.weight", "bn.bias", "fc.weight"]


def test_seer_excludes_nothing():
    net = Net()
    groups = parameter_groups(
        net.named_parameters(), weight_decay=1e-5, exclude_bias_and_norm=False
    )
    assert len(groups) == 1
    assert groups[0]["names"] == [*NAMES, "fc.bias"]
    assert groups[0]["weight_decay"] == 1e-5
    assert groups[0]["decayed"]
    by_name = dict(net.named_parameters())
    for name, parameter in zip(groups[0]["names"], groups[0]["params"], strict=True):
        assert parameter is by_name[name]


def test_adamw_excludes_biases_and_norms():
    groups = parameter_groups(
        Net().named_parameters(), weight_decay=0.05, exclude_bias_and_norm=True
    )
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [group["decayed"] for group in groups] == [True, False]
    assert groups[0]["names"] == ["token", "conv.weight", "fc.weight"]
    assert groups[1]["names"] == ["scale", "conv.bias", "bn.weight", "bn.bias", "fc.bias"]


def test_no_group_is_empty():
    linear = nn.Linear(2, 2, bias=False)
    groups = parameter_groups(
        linear.named_parameters(), weight_decay=0.05, exclude_bias_and_norm=True
    )
    assert [group["names"] for group in groups] == [["weight"]]
    with pytest.raises(ValueError, match="nothing to optimise"):
        parameter_groups(
            linear.requires_grad_(False).named_parameters(),
            weight_decay=0.05,
            exclude_bias_and_norm=True,
        )


@pytest.mark.parametrize("kind", [AdamW, LARS])
def test_scheduled_values_reach_the_groups_they_apply_to(kind: type):
    groups = parameter_groups(
        Net().named_parameters(), weight_decay=0.0, exclude_bias_and_norm=True
    )
    optimizer = kind(groups)
    set_hyperparameters(optimizer, lr=0.3, weight_decay=0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]
    assert optimizer.param_groups[0]["names"] == ["token", "conv.weight", "fc.weight"]


def vit() -> VisionTransformer:
    return VisionTransformer(
        width=16, depth=4, heads=2, image_size=32, patch_size=8, mask_token=True, register_tokens=2
    )


def test_layers_learn_at_the_rates_of_dinov2():
    """decay ** (depth + 1 - layer): layer 0 the embeddings, i + 1 block i, depth + 1 the norm."""
    trunk = vit()
    factors = lr_factors(trunk, trunk.units(), decay=0.9, patch_embed=0.2)
    by_name = {name: factors[p] for name, p in trunk.named_parameters()}
    for name, factor in by_name.items():
        if name.startswith("blocks."):
            expected = 0.9 ** (4 - int(name.split(".")[1]))
        elif name.startswith("norm."):
            expected = 1.0
        else:
            expected = 0.9**5 * (0.2 if name.startswith("patch_embed.") else 1.0)
        assert factor == pytest.approx(expected), name
    assert lr_factors(trunk, trunk.units()) == {}


def test_a_schedule_sets_every_group_by_its_factor():
    trunk, head = vit(), nn.Linear(16, 4)
    named = [*trunk.named_parameters(), *head.named_parameters()]
    factors = lr_factors(trunk, trunk.units(), decay=0.5)
    groups = parameter_groups(
        named, weight_decay=0.04, exclude_bias_and_norm=True, lr_factors=factors
    )
    optimizer = AdamW(groups)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.3)
    rates = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[head.weight] == (0.1, 0.3) and rates[head.bias] == (0.1, 0.0)
    assert rates[trunk.pos_embed] == (pytest.approx(0.1 / 32), 0.3)
    assert rates[trunk.blocks[3].norm1.weight] == (pytest.approx(0.05), 0.0)
    assert len(rates) == len(named)


def test_the_stem_of_a_convolutional_trunk_is_before_its_blocks():
    trunk = RegNetY(depth=5, w_0=8, w_a=12.0, w_m=2.0, group_width=8, stem_width=8)
    factors = lr_factors(trunk, trunk.units(), decay=0.5)
    by_name = {name: factors[p] for name, p in trunk.named_parameters()}
    stem = [f for n, f in by_name.items() if n.startswith("stem")]
    assert stem and set(stem) == {0.5**6}
    assert max(by_name.values()) == 0.5
    with pytest.raises(ValueError, match=r"patch_embed_lr_factor=0\.2 needs a ViT"):
        lr_factors(trunk, trunk.units(), patch_embed=0.2)
    with pytest.raises(ValueError, match="layer_decay=2"):
        lr_factors(trunk, trunk.units(), decay=2)


def test_clipping_each_tensor_by_its_own_norm():
    """As DINO's clip_gradients: 3 / (norm + 1e-6) where that is below 1; what is returned is the
    norm of all, before."""
    parameters = [
        nn.Parameter(torch.zeros(4)),
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.ones(1)),
    ]
    gradients = [torch.full((4,), 5.0), torch.full((2, 2), 0.5)]
    optimizer = AdamW(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    norm = gradient_norm(optimizer, clip=3.0, per_tensor=True)
    assert norm.item() == pytest.approx((100 + 1) ** 0.5)
    assert torch.allclose(parameters[0].grad, torch.full((4,), 1.5))
    assert torch.equal(parameters[1].grad, gradients[1])
    parameters[0].grad[0] = torch.nan
    assert not gradient_norm(optimizer, clip=3.0, per_tensor=True).isfinite()
