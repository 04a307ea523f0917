"""SyncBatchNorm over ranks against torch's BatchNorm over the whole batch in one process."""

import copy

import pytest
import torch
from torch import nn

from selfsight.distributed import syncbn
from selfsight.distributed.batchnorm import frozen_running_statistics
from selfsight.distributed.env import World
from tests.parallel.ranks import on_ranks

CHANNELS = 5
SHAPES = {1: (), 2: (3, 4)}


def _layer(dims: int, dtype: torch.dtype, **options) -> nn.Module:
    torch.manual_seed(0)
    layer = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(CHANNELS, **options).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer


def _images(count: int, dims: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images far from zero (mean 50, deviation 1 to 2), and a gradient for the output."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, CHANNELS, *SHAPES[dims])
    scale = torch.linspace(1, 2, CHANNELS, dtype=torch.float64).view(-1, *[1] * len(SHAPES[dims]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + 50
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), dy.to(dtype)


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d_{name}": p.grad for name, p in layer.named_parameters()}
    return {k: v for k, v in found.items() if v is not None} | dict(layer.named_buffers())


def _synchronised(
    world: World, counts: list[int], dims: int, dtype: torch.dtype, group: int, options: dict
) -> dict:
    layer = _layer(dims, dtype, **options)
    assert syncbn.convert(layer, group, world) == min(group, world.size)
    assert type(layer) is syncbn.SyncBatchNorm
    x, dy = (t.split(counts)[world.rank] for t in _images(sum(counts), dims, dtype))
    _step(layer, x.flip(0) * 2, dy)  # a first step, so that averages of two steps are compared
    layer.zero_grad()
    return _step(layer, x, dy)


def _whole(counts: list[int], dims: int, dtype: torch.dtype, options: dict) -> dict:
    layer = _layer(dims, dtype, **options)
    x, dy = _images(sum(counts), dims, dtype)
    _step(layer, torch.cat([part.flip(0) for part in x.split(counts)]) * 2, dy)
    layer.zero_grad()
    return _step(layer, x, dy)


def _compare(ranks: list[dict], whole: dict, tolerance: float) -> None:
    assert ranks[0].keys() == whole.keys()
    for name, expected in whole.items():
        if name in ("y", "dx"):
            found = [torch.cat([rank[name] for rank in ranks])]
        elif name.startswith("d_"):
            found = [torch.stack([rank[name] for rank in ranks]).sum(0)]
        else:
            found = [rank[name] for rank in ranks]
        for value in found:
            assert value.dtype == expected.dtype
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("counts", "dims", "dtype", "tolerance", "options"),
    [
        ([4, 4], 2, torch.float64, 1e-11, {}),
        ([4, 4], 1, torch.float64, 1e-11, {"momentum": None}),
        ([2, 5, 1], 2, torch.float64, 1e-11, {"momentum": 0.3, "eps": 1e-3}),
        ([3, 0, 4], 2, torch.float64, 1e-11, {}),
        ([2, 6], 2, torch.float32, 2e-5, {}),
        ([2, 6], 2, torch.float32, 2e-5, {"affine": False}),
        ([3, 5], 1, torch.float32, 2e-5, {"track_running_stats": False}),
    ],
)
def test_equals_batchnorm_over_the_whole_batch(counts, dims, dtype, tolerance, options):
    size = len(counts)
    ranks = on_ranks(size, _synchronised, counts, dims, dtype, size, options)
    _compare(ranks, _whole(counts, dims, dtype, options), tolerance)


def _half(world: World, dtype: torch.dtype) -> dict:
    layer = _layer(2, torch.float32)
    syncbn.convert(layer, world.size, world)
    x, dy = (t.chunk(2)[world.rank].to(dtype) for t in _images(8, 2, torch.float64))
    return _step(layer, x, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_have_float32_statistics(dtype):
    ranks = on_ranks(2, _half, dtype)
    x, dy = (t.to(dtype).double() for t in _images(8, 2, torch.float64))
    whole = _step(_layer(2, torch.float64), x, dy)
    assert ranks[0]["y"].dtype == ranks[0]["dx"].dtype == dtype
    assert ranks[0]["d_weight"].dtype == ranks[0]["running_var"].dtype == torch.float32
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ranks[1][name].double(), whole[name], rtol=1e-6, atol=1e-6)
    for name in ("y", "dx"):
        found = torch.cat([rank[name] for rank in ranks]).double()
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found, whole[name], rtol=rounding, atol=rounding)


def _in_groups(world: World) -> list[dict]:
    found = []
    for group in (1, 2):
        layer = _layer(2, torch.float64)
        assert syncbn.convert(layer, group, world) == group
        x, dy = (t.chunk(4)[world.rank] for t in _images(8, 2, torch.float64))
        found.append(_step(layer, x, dy))
    return found


def test_groups_of_one_and_two_of_four_ranks():
    ranks = on_ranks(4, _in_groups)
    x, dy = _images(8, 2, torch.float64)
    for number, group in enumerate((1, 2)):
        for first in range(0, 4, group):
            part = slice(2 * first, 2 * (first + group))
            whole = _step(_layer(2, torch.float64), x[part], dy[part])
            _compare([ranks[r][number] for r in range(first, first + group)], whole, 1e-11)


@pytest.mark.parametrize(
    ("size", "world", "local", "fits"),
    [
        (8, 16, 8, 8),
        (4, 16, 8, 4),
        (16, 16, 8, 16),
        (64, 512, 8, 64),
        (64, 16, 8, 16),
        (8, 1, 1, 1),
        (2, 4, 1, 2),
        (3, 3, 3, 3),
    ],
)
def test_group_sizes_that_fit(size, world, local, fits):
    assert syncbn.fitting_group_size(size, World(0, world, 0, local)) == fits


@pytest.mark.parametrize(
    ("size", "world", "local", "named"),
    [
        (3, 16, 8, "1, 2, 4, 8, 16"),
        (12, 48, 8, "1, 2, 4, 8, 16, 24, 48"),
        (32, 48, 8, "1, 2, 4, 8, 16, 24, 48"),
        (0, 4, 2, "1, 2, 4"),
    ],
)
def test_other_sizes_are_refused_with_those_that_fit(size, world, local, named):
    with pytest.raises(ValueError, match=f"groups of {size} ranks .* fit are {named}\\."):
        syncbn.fitting_group_size(size, World(0, world, 0, local))


def test_layers_of_other_libraries_are_refused_by_name():
    class Other(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Other(4))
    with pytest.raises(ValueError, match="1 is a Other"):
        syncbn.convert(model, 2, World(0, 2, 0, 2))


def _converted(world: World) -> dict:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3))
    before = dict(model.state_dict())
    parameters = list(model.parameters())
    syncbn.convert(model, 8, world)
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.eval()  # evaluation needs no other rank, and a copy can be made for it
    x = torch.randn(2, 3, 4, 4)
    return {"y": model(x) - copy.deepcopy(model)(x) if world.main else torch.zeros(1)}


def test_conversion_keeps_names_and_parameters_and_evaluates_alone():
    assert not on_ranks(2, _converted)[0]["y"].any()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, syncbn.SyncBatchNorm])
def test_frozen_running_statistics(kind):
    layer = kind(CHANNELS)
    model = nn.Sequential(layer)
    x, _ = _images(4, 2, torch.float32)
    model(x)
    before = copy.deepcopy(layer.state_dict())
    expected = nn.functional.batch_norm(x, None, None, training=True)
    with frozen_running_statistics(model):
        torch.testing.assert_close(model(x), expected)
        with frozen_running_statistics(layer):
            model(x)
        model(x)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    model(x)
    assert int(layer.num_batches_tracked) == 2


def test_frozen_running_statistics_are_released_by_an_error():
    layer = nn.BatchNorm2d(CHANNELS)
    buffers = list(layer.buffers())
    with pytest.raises(RuntimeError, match="stop"), frozen_running_statistics(layer):
        layer(_images(4, 2, torch.float32)[0])
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip(layer.buffers(), buffers, strict=True))
    assert int(layer.get_buffer("num_batches_tracked")) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gpu_kernels_equal_batchnorm_in_float64(dtype, layout):
    x, dy = (t.to(dtype) for t in _images(16, 2, torch.float64))
    whole = _step(_layer(2, torch.float64), x.double(), dy.double())
    layer = _layer(2, torch.float32)
    layer.__class__ = syncbn.SyncBatchNorm
    x, dy = (t.cuda().to(memory_format=layout) for t in (x, dy))
    found = _step(layer.cuda(), x, dy)
    rounding = max(4 * torch.finfo(dtype).eps, 2e-5)
    for name, expected in whole.items():
        torch.testing.assert_close(
            found[name].cpu().to(expected.dtype), expected, rtol=rounding, atol=rounding
        )
