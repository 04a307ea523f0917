"""A network laid out over gloo ranks against one process that sees the whole batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selfsight.distributed.env import World
from selfsight.distributed.parallelize import no_sync, parallelize, unwrap
from tests.parallel.ranks import on_ranks

IMAGES = 12


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()


class Method(nn.Module):
    """A convolutional trunk and a head, whose forward gives the loss of a regression."""

    def __init__(self, norm: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(Block(3, 8, norm), Block(8, 16, norm))
        self.expand, self.head = nn.Linear(16, 500), nn.Linear(500, 10)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        features = self.expand(self.trunk(images).mean((2, 3))).relu()
        return (self.head(features) - targets).square().mean()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images + 1, torch.randn(IMAGES, 10, generator=generator, dtype=torch.float64)


def _train(
    module: nn.Module,
    world: World,
    micro: int = 1,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """SGD on this rank's share of each batch, in `micro` parts; losses, last gradients, state."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(3):
        share = [t.to(dtype).chunk(world.size)[world.rank].chunk(micro) for t in _batch(step)]
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for part, (images, targets) in enumerate(zip(*share, strict=True)):
            with no_sync(module, enabled=part < micro - 1):
                loss = module(images, targets) / micro
                loss.backward()
            total += loss.detach()
        losses.append(total)
        optimizer.step()
    method = unwrap(module)
    gradients = {f"gradient.{n}": p.grad for n, p in method.named_parameters()}
    found = {"losses": torch.stack(losses), **gradients, **method.state_dict()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def _on_rank(world: World, checkpointing: bool, micro: int, norm: bool) -> dict[str, torch.Tensor]:
    method = Method(norm).double()
    module = parallelize(
        method,
        units=list(method.trunk),
        world=world,
        syncbn_group_size=world.size,
        activation_checkpointing=checkpointing,
    )
    assert isinstance(module, DistributedDataParallel)
    assert unwrap(module) is method
    assert list(method.state_dict()) == list(Method(norm).state_dict())
    return _train(module, world, micro)


def _compare(ranks: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]) -> None:
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, whole["losses"], rtol=1e-10, atol=1e-12)
    for rank in ranks:
        assert rank.keys() == whole.keys()
        for name in whole.keys() - {"losses"}:
            torch.testing.assert_close(rank[name], whole[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ranks_equal_one_process_on_the_whole_batch(size, checkpointing):
    ranks = on_ranks(size, _on_rank, checkpointing, 1, True)
    _compare(ranks, _train(Method().double(), World()))
    assert int(ranks[0]["trunk.0.norm.num_batches_tracked"]) == 3


def test_checkpointing_changes_no_bit_on_two_ranks():
    plain, repeated = (
        on_ranks(2, _on_rank, checkpointing, 1, True) for checkpointing in (False, True)
    )
    for a, b in zip(plain, repeated, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_equals_the_whole_batch(checkpointing):
    ranks = on_ranks(2, _on_rank, checkpointing, 3, False)
    _compare(ranks, _train(Method(norm=False).double(), World()))


def test_a_world_of_one_returns_the_method_itself():
    method = Method()
    twin = copy.deepcopy(method)
    module = parallelize(
        method,
        units=list(method.trunk),
        world=World(),
        syncbn_group_size=8,
        activation_checkpointing=True,
    )
    assert module is method
    assert unwrap(module) is method
    assert type(method.get_submodule("trunk.0.norm")) is nn.BatchNorm2d
    with no_sync(module):
        pass
    found, plain = (_train(m, World(), dtype=torch.float32) for m in (module, twin))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def _resumed(world: World) -> bool:
    """Whether a fresh layout gives, for the same images, the bits that a used one gives."""
    gradients = []
    for steps in (0, 1, 3):
        torch.manual_seed(0)
        module = parallelize(Method(), units=[], world=world, syncbn_group_size=world.size)
        images, targets = (t.float().chunk(world.size)[world.rank] for t in _batch(0))
        for _ in range(steps + 1):
            module.zero_grad()
            module(images, targets).backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    first = gradients[0]
    return all(torch.equal(a, b) for other in gradients for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [3, 4])
def test_the_first_step_after_a_resume_has_the_bits_of_any_other(size):
    """Fails with a plain DDP: it moves gradients between buckets after its first step."""
    assert on_ranks(size, _resumed) == [True] * size


def _fresh_gradients(world: World) -> bool:
    module = parallelize(Method(), units=[], world=world)
    return all(p.grad is None for p in module.parameters()) and "forward" not in vars(
        unwrap(module)
    )


def test_the_layout_leaves_no_gradient_behind():
    assert on_ranks(2, _fresh_gradients) == [True, True]


def _unequal(world: World, what: str) -> str:
    method = Method()
    if what == "parameters":
        with torch.no_grad():
            method.head.weight.add_(world.rank)
    elif what == "values":
        method.get_buffer("queue").fill_(world.rank)
    else:
        method.register_buffer("queue", torch.zeros(4 + world.rank))
    try:
        module = parallelize(method, units=[], world=world)
    except ValueError as error:
        return str(error)
    weight = dict(unwrap(module).named_parameters())["head.weight"]
    return "" if torch.equal(weight, Method().head.weight) else "differs"


def test_parameters_become_those_of_rank_0():
    assert on_ranks(2, _unequal, "parameters") == ["", ""]


@pytest.mark.parametrize("what", ["values", "shape"])
def test_unequal_buffers_are_refused_by_name(what):
    for rank, said in enumerate(on_ranks(2, _unequal, what)):
        assert f"buffer queue of rank {1 - rank} differs" in said


def test_a_group_size_that_does_not_fit_is_refused():
    world = World(0, 4, 0, 4)
    with pytest.raises(ValueError, match=r"groups of 3 ranks .* fit are 1, 2, 4\."):
        parallelize(Method(), units=[], world=world, syncbn_group_size=3)
