"""KoLeo against its formula, and over ranks."""

import pytest
import torch
from torch import Tensor

from selfsight.distributed import collectives
from selfsight.distributed.env import World
from selfsight.losses.koleo import koleo_loss
from tests.parallel.ranks import on_ranks


def features(n: int = 12) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(0))


def test_value_and_gradient_are_those_of_the_formula():
    x = features().requires_grad_()
    y = features().double().requires_grad_()
    unit = y / y.norm(dim=1, keepdim=True)
    nearest = torch.cdist(unit, unit).fill_diagonal_(torch.inf).argmin(1)
    expected = -(unit - unit[nearest]).norm(dim=1).log().mean()
    found = koleo_loss(x)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    (a,) = torch.autograd.grad(found, x)
    (b,) = torch.autograd.grad(expected, y)
    assert torch.allclose(a.double(), b, atol=1e-5)


def test_equal_features_are_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


def test_spreading_lowers_it():
    x = torch.nn.Parameter(1 + 0.01 * features())
    before = koleo_loss(x).item()
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        koleo_loss(x).backward()
        optimizer.step()
    assert koleo_loss(x).item() < before - 1


def _on_rank(world: World) -> list[Tensor]:
    own = features()[world.rank * 6 :][:6].clone().requires_grad_()
    loss = koleo_loss(own)
    loss.backward()
    assert own.grad is not None
    # DDP takes the mean over ranks of the gradients of shared weights
    return [loss.detach(), collectives.all_gather_rows(own.grad / world.size)]


def test_two_ranks_are_one_with_all_features():
    x = features().requires_grad_()
    whole = koleo_loss(x)
    whole.backward()
    for loss, gradient in on_ranks(2, _on_rank):
        assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
        assert torch.allclose(gradient, x.grad, atol=1e-6)
