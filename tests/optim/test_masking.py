"""A masked step changes nothing, in every optimiser we configure, and state keys never change."""

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight.optim.adamw import AdamW
from selfsight.optim.lars import LARS
from selfsight.optim.rmsprop import RMSprop
from selfsight.optim.sgd import SGD

CONF = Path(__file__).parents[2] / "conf" / "optim"
KINDS = [LARS, SGD, AdamW, RMSprop]


def build(kind: type, seed: int = 0) -> tuple[Optimizer, list[Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    params = [
        Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), (3, 3))
    ]
    return kind(params, lr=0.1, weight_decay=0.01), params


def give_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def everything(optimizer: Optimizer, params: list[Parameter]) -> list[torch.Tensor]:
    state = [value for p in params for value in optimizer.state[p].values()]
    return [item.detach().clone() for item in [*params, *state]]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_step_changes_nothing(kind: type, poison: float, first: bool):
    """Also as the very first one; and the run then goes on as if it had not been."""
    optimizer, params = build(kind)
    twin, twins = build(kind)
    if not first:
        for one, members in ((optimizer, params), (twin, twins)):
            give_gradients(members, 1)
            one.step()
    before = everything(optimizer, params)
    give_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[0, 0] = poison
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    for one, other in zip(before, everything(optimizer, params), strict=True):
        assert torch.equal(one, other)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for one, members in ((optimizer, params), (twin, twins)):
        give_gradients(members, 3)
        one.step()
    for one, other in zip(everything(optimizer, params), everything(twin, twins), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_gradient_is_left_alone(kind: type):
    optimizer, params = build(kind)
    give_gradients(params, 1)
    optimizer.step()
    weight = params[2].detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[params[2]].items()}
    give_gradients(params, 2)
    params[2].grad = None
    optimizer.step()
    assert torch.equal(params[2], weight)
    for key, value in optimizer.state[params[2]].items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_complete_before_the_first_step(kind: type):
    optimizer, params = build(kind)
    keys = {number: set(item) for number, item in optimizer.state_dict()["state"].items()}
    assert len(keys) == len(params)
    give_gradients(params, 1)
    optimizer.step()
    after = {number: set(item) for number, item in optimizer.state_dict()["state"].items()}
    assert keys == after


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SGD, {"momentum": 0.9}), (AdamW, {"betas": (0.9, 0.999)})]
)
def test_equals_pytorch_with_lazy_state(ours: type, theirs: dict):
    optimizer, params = build(ours)
    peers = [Parameter(p.detach().clone()) for p in params]
    peer_kind = torch.optim.SGD if ours is SGD else torch.optim.AdamW
    peer = peer_kind(peers, lr=0.1, weight_decay=0.01, foreach=False, **theirs)
    for step in range(4):
        for one, members in ((optimizer, params), (peer, peers)):
            give_gradients(members, step)
            one.step()
    for one, other in zip(params, peers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_state_continues_bit_for_bit(kind: type):
    optimizer, params = build(kind)
    give_gradients(params, 1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    second, others = build(kind, seed=9)
    second.load_state_dict(saved)
    for one, other in zip(params, others, strict=True):
        other.data.copy_(one.data)
    for one, members in ((optimizer, params), (second, others)):
        give_gradients(members, 2)
        one.step()
    for one, other in zip(everything(optimizer, params), everything(second, others), strict=True):
        assert torch.equal(one, other)


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "item"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_from_the_device(kind: type):
    optimizer, params = build(kind)
    give_gradients(params, 1)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    with NoReading():
        optimizer.step()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_the_yaml_lists_every_argument(name: str):
    """All but the rate and the decay, which the loop and the groups set."""
    node = OmegaConf.load(CONF / f"{name}.yaml")
    rates = {"layer_decay", "patch_embed_lr_factor", "trunk_lr_factor"}
    assert set(node) == {"weight_decay", "exclude_bias_and_norm", "optimizer", *rates}
    optimizer = dict(node.optimizer)
    module, _, attribute = optimizer.pop("_target_").rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    assert optimizer.pop("_partial_") is True
    arguments = set(inspect.signature(kind).parameters) - {"params", "lr", "weight_decay"}
    assert set(optimizer) == arguments
    made = kind([Parameter(torch.ones(2))], lr=0.1, weight_decay=node.weight_decay, **optimizer)
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    made.step()
    assert (made.param_groups[0]["params"][0] < 1).all()
