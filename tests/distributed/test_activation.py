"""Activation checkpointing against the same network without it."""

import copy

import pytest
import torch
from torch import nn

from selfsight.distributed.activation import checkpoint_activations
from selfsight.distributed.batchnorm import frozen_running_statistics


class Network(nn.Module):
    """Two blocks and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(3, 8), Block(8, 8)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)).flatten(1))


class Block(nn.Module):
    """Convolution, BatchNorm, and a random part, as drop path has."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.calls = 0

    def forward(self, x: torch.Tensor, *, rate: float = 0.3) -> torch.Tensor:
        self.calls += 1
        x = self.norm(self.conv(x)).relu()
        keep = torch.rand(x.shape[0], 1, 1, 1) >= rate
        return x * keep


def _train(network: Network) -> list[torch.Tensor]:
    """Three steps on two crop sizes each, by SGD; losses, gradients, then all state."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    seen: list[torch.Tensor] = []
    for _ in range(3):
        images = torch.randn(5, 3, 6, 6)
        loss = network(images).square().mean() + network(images.flip(0) * 2).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        seen += [
            loss.detach(),
            *(p.grad.clone() for p in network.parameters() if p.grad is not None),
        ]
        optimizer.step()
    return [*seen, *network.state_dict().values(), torch.rand(3)]


def test_bitwise_equal_and_statistics_updated_once():
    plain, repeated = Network(), Network()
    checkpoint_activations([repeated.first, repeated.second])
    expected, found = _train(plain), _train(repeated)
    assert list(plain.state_dict()) == list(repeated.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert int(repeated.first.norm.get_buffer("num_batches_tracked")) == 6
    assert (plain.first.calls, repeated.first.calls) == (6, 12)


def test_nothing_is_repeated_without_gradients():
    network = Network()
    checkpoint_activations([network.first])
    with torch.no_grad(), frozen_running_statistics(network):
        network(torch.randn(2, 3, 6, 6))
    assert network.first.calls == 1
    assert int(network.first.norm.get_buffer("num_batches_tracked")) == 0


def test_evaluation_with_gradients_uses_running_statistics():
    network = Network()
    reference = copy.deepcopy(network)
    checkpoint_activations([network.first])
    x = torch.randn(2, 3, 6, 6)
    for model in (network, reference):
        model.eval()
        torch.manual_seed(3)
        model(x).sum().backward()
    found, expected = network.first.conv.weight.grad, reference.first.conv.weight.grad
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_class_name_copies_and_a_second_call():
    network = Network()
    for _ in range(2):
        checkpoint_activations([network.first])
    assert isinstance(network.first, Block)
    assert type(network.first).__mro__[2] is Block
    twin = copy.deepcopy(network)
    twin.first.conv.weight.data.zero_()
    x = torch.randn(2, 3, 6, 6)
    assert not torch.equal(twin.first(x), network.first(x))


def test_options_reach_the_block():
    block = Block(3, 4)
    checkpoint_activations([block])
    assert not block(torch.randn(2, 3, 6, 6), rate=1.0).any()


def test_a_unit_within_another_is_refused():
    network = Network()
    with pytest.raises(ValueError, match=r"unit 1 \(Block\) lies within"):
        checkpoint_activations([network, network.first])
