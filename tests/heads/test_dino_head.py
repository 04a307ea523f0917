"""DINO's head against PyTorch's own weight normalisation, and its names."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from selfsight.heads.dino_head import DinoHead


def theirs(head: DinoHead) -> nn.Module:
    """The same head from PyTorch's parts."""
    v = head.last_layer.weight_v
    last = parametrizations.weight_norm(nn.Linear(v.shape[1], v.shape[0], bias=False))
    with torch.no_grad():
        last.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        last.parametrizations.weight.original1.copy_(v)
    return nn.ModuleList([copy.deepcopy(head.mlp), last])


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_values_and_gradients_are_pytorchs(layers):
    torch.manual_seed(0)
    head = DinoHead(
        in_width=12, hidden=20, layers=layers, bottleneck=8, prototypes=30, frozen_norm=False
    )
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    peer = theirs(head)
    x = torch.randn(5, 12)
    mlp, last = peer
    expected = last(nn.functional.normalize(mlp(x), dim=-1))
    found = head(x)
    assert torch.allclose(found, expected, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(
        head.last_layer.weight_v.grad, last.parametrizations.weight.original1.grad, atol=1e-5
    )
    assert torch.allclose(
        head.last_layer.weight_g.grad, last.parametrizations.weight.original0.grad, atol=1e-5
    )
    assert torch.allclose(head.mlp[0].weight.grad, mlp[0].weight.grad, atol=1e-5, rtol=1e-4)


def test_names_and_shapes_are_those_of_the_released_heads():
    shapes = {
        k: tuple(v.shape) for k, v in DinoHead(in_width=8, prototypes=64).state_dict().items()
    }
    assert shapes == {
        "mlp.0.weight": (2048, 8), "mlp.0.bias": (2048,), "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,), "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,),
        "last_layer.weight_g": (64, 1), "last_layer.weight_v": (64, 256),
    }  # fmt: skip


def test_frozen_norms_stay_one_and_scores_are_cosines():
    head = DinoHead(in_width=8, hidden=16, bottleneck=4, prototypes=10)
    assert not head.last_layer.weight_g.requires_grad
    assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))
    scores = head(torch.randn(50, 8))
    assert scores.abs().max() <= 1 + 1e-6


def test_scores_are_float32_under_autocast():
    head = DinoHead(in_width=8, hidden=16, bottleneck=4, prototypes=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(3, 8)).dtype == torch.float32


def test_initialisation_is_dinos():
    torch.manual_seed(0)
    head = DinoHead(in_width=256, hidden=256, bottleneck=256, prototypes=512)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.mlp[2].bias.any()
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)


def test_a_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least 1 layer"):
        DinoHead(in_width=8, layers=0)
