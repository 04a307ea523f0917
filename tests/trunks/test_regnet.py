"""RegNetY against torchvision's and timm's models with the same weights, and its contract."""

import copy
import inspect
import math
import re
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import regnet as torchvision_regnet

from selfsight.trunks.geometry import regnet_geometry, regnety_parameters
from selfsight.trunks.regnet import RegNetY

RULE = ("depth", "w_0", "w_a", "w_m", "group_width")
MODELS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("regnety_*.yaml"))
SMALL = {"depth": 5, "w_0": 32, "w_a": 48.0, "w_m": 2.0, "group_width": 16}


def load(path) -> dict[str, Any]:
    """A model's yaml as plain containers, interpolations as written."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))


def trunk_arguments(name) -> dict[str, Any]:
    """Arguments of the trunk in conf/model/regnety_NAME.yaml."""
    trunk = load(next(path for path in MODELS if path.stem == f"regnety_{name}"))["trunk"]
    assert trunk.pop("_target_") == "selfsight.trunks.regnet.RegNetY"
    assert trunk["in_channels"] == "${pixels.channels}"
    return trunk | {"in_channels": 3}


def torchvision_model(name: str) -> Any:
    """torchvision's RegNetY of the published widths, without classifier."""
    if name == "800mf":  # its own builder widens this one
        geometry = regnet_geometry(**{key: trunk_arguments(name)[key] for key in RULE})
        model: Any = torchvision_regnet.RegNet(
            torchvision_regnet.BlockParams(
                depths=list(geometry.depths),
                widths=list(geometry.widths),
                group_widths=list(geometry.group_widths),
                bottleneck_multipliers=[1.0] * 4,
                strides=[2] * 4,
                se_ratio=0.25,
            )
        )
    else:
        model = getattr(torchvision_regnet, f"regnet_y_{name.replace('.', '_')}")()
    model.fc = nn.Identity()
    return model


def randomise(model):
    """Give norms and statistics values that make every one of them matter."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.2)):
                nn.init.uniform_(tensor, low, low + 0.5, generator=generator)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)


def timm_name(key):
    """timm's name of one of our parameters."""
    key = re.sub(r"^stem\.0", "stem.conv", key)
    key = re.sub(r"^stem\.1", "stem.bn", key)
    key = re.sub(
        r"^trunk_output\.block(\d)\.block\1-(\d+)\.",
        lambda m: f"s{m[1]}.b{int(m[2]) + 1}.",
        key,
    )
    for ours, theirs in (("f.a", "conv1"), ("f.b", "conv2"), ("f.c", "conv3")):
        key = key.replace(f".{ours}.0.", f".{theirs}.conv.").replace(
            f".{ours}.1.", f".{theirs}.bn."
        )
    key = key.replace(".proj.0.", ".downsample.conv.").replace(".proj.1.", ".downsample.bn.")
    return key.replace(".f.se.", ".se.")


def assert_same_outputs(ours, theirs, size):
    """Outputs agree in float64, with running statistics and with those of the batch."""
    ours, theirs = ours.double(), theirs.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for training in (False, True):
            ours.train(training)
            theirs.train(training)
            torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["400mf", "800mf", "1.6gf", "3.2gf"])
def test_equals_torchvision(name):
    theirs = torchvision_model(name)
    randomise(theirs)
    ours = RegNetY(**trunk_arguments(name))
    ours.load_state_dict(theirs.state_dict())
    assert_same_outputs(ours, theirs, (48, 64))
    buffers = dict(theirs.named_buffers())  # moved by the forward pass in training
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[key])


def test_gradients_equal_torchvision():
    theirs = torchvision_model("400mf").double()
    randomise(theirs)
    ours = RegNetY(**trunk_arguments("400mf")).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    weight = torch.randn(3, ours.width, dtype=torch.float64)
    for model in (ours, theirs):
        (model(images) * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key])


@pytest.mark.parametrize("name", ["400mf", "1.6gf", "3.2gf", "16gf", "32gf", "128gf"])
def test_state_dict_has_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours = {k: v.shape for k, v in RegNetY(**trunk_arguments(name)).state_dict().items()}
    params = torchvision_regnet.BlockParams.from_init_params(
        **{key: trunk_arguments(name)[key] for key in RULE}, se_ratio=0.25
    )
    with torch.device("meta"):
        model = torchvision_regnet.RegNet(params)
    theirs = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "theirs"), [("8gf", [224, 448, 896, 2016]), ("800mf", [64, 144, 320, 784])]
)
def test_torchvision_widens_two_published_sizes(name, theirs):
    numbers = {key: trunk_arguments(name)[key] for key in RULE}
    assert torchvision_regnet.BlockParams.from_init_params(**numbers).widths == theirs
    published = {"8gf": (168, 448, 896, 2016), "800mf": (64, 128, 320, 768)}
    assert regnet_geometry(**numbers).widths == published[name]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("200mf", "regnety_002"),
        ("400mf", "regnety_004"),
        ("800mf", "regnety_008"),
        ("1.6gf", "regnety_016"),
        ("4gf", "regnety_040"),
    ],
)
def test_equals_timm(name, theirs):
    model = timm.create_model(theirs, num_classes=0)
    randomise(model)
    ours = RegNetY(**trunk_arguments(name))
    weights = model.state_dict()
    ours.load_state_dict({key: weights.pop(timm_name(key)) for key in ours.state_dict()})
    assert not weights
    assert_same_outputs(ours, model, (32, 64))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_file_lists_every_argument_and_builds(path):
    config = load(path)
    assert config["trunk_parameters"] == "${regnety_parameters:${.trunk}}"
    arguments = trunk_arguments(path.stem.removeprefix("regnety_"))
    signature = inspect.signature(RegNetY).parameters
    assert list(arguments) == list(signature)
    with torch.device("meta"):
        trunk = RegNetY(**arguments)
    count = sum(p.numel() for p in trunk.parameters())
    assert count == regnety_parameters(**arguments)
    assert f"{count:,} parameters" in path.read_text()
    assert config["head"]["widths"][0] == trunk.width


def test_model_files_of_32gf_and_more_pull_in_the_recipe_and_say_so():
    seer = set()
    for path in MODELS:
        config = load(path)
        if "defaults" in config:
            assert config["defaults"] == ["/recipe/seer", "_self_"]
            assert "pulls in the SEER recipe" in path.read_text().splitlines()[0]
            seer.add(path.stem.removeprefix("regnety_"))
    assert seer == {"32gf", "64gf", "128gf", "256gf", "10b"}


def test_initialisation_statistics():
    torch.manual_seed(0)
    trunk = RegNetY(**trunk_arguments("800mf"))
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            n = module.weight.numel()
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            # Five standard errors of a mean and of a standard deviation.
            assert abs(module.weight.mean()) < 5 * std / math.sqrt(n), name
            assert abs(module.weight.std() - std) < 5 * std / math.sqrt(2 * n), name
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_channels)
                assert 0 < module.bias.abs().max() <= bound, name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert module.eps == 1e-5 and module.momentum == 0.1


def test_init_weights_fills_everything_after_meta():
    with torch.device("meta"):
        trunk = RegNetY(**SMALL)
    trunk.to_empty(device="cpu")
    for tensor in trunk.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    torch.manual_seed(0)
    trunk.init_weights()
    state = trunk.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(int(v) == 0 for k, v in state.items() if k.endswith("num_batches_tracked"))
    assert all((v == 1).all() for k, v in state.items() if k.endswith("running_var"))


@pytest.mark.parametrize(
    ("strides", "expected"),
    [((2, 2), (4, 8, 16, 32)), ((2, 1), (2, 4, 8, 16)), ((1, 1), (1, 2, 4, 8))],
)
@pytest.mark.parametrize("size", [(64, 64), (65, 100)])
def test_features_have_the_stated_channels_and_strides(strides, expected, size):
    trunk = RegNetY(**SMALL, stem_stride=strides[0], first_stage_stride=strides[1]).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, out = trunk.features(images), trunk(images)
    assert list(maps) == list(trunk.feature_info) == ["c2", "c3", "c4", "c5"]
    assert tuple(info.stride for info in trunk.feature_info.values()) == expected
    assert tuple(info.channels for info in trunk.feature_info.values()) == (32, 64, 128, 256)
    for level, info in trunk.feature_info.items():
        side = [math.ceil(length / info.stride) for length in size]
        assert maps[level].shape == (2, info.channels, *side)
    assert out.shape == (2, trunk.width) == (2, 256)
    torch.testing.assert_close(maps["c5"].mean((2, 3)), out)


def test_units_are_all_blocks_and_may_be_replaced():
    trunk = RegNetY(**SMALL)
    units = trunk.units()
    assert len(units) == SMALL["depth"]
    assert all(isinstance(unit, torchvision_regnet.ResBottleneckBlock) for unit in units)
    outside = sum(p.numel() for p in trunk.stem.parameters())
    inside = sum(p.numel() for unit in units for p in unit.parameters())
    assert inside + outside == sum(p.numel() for p in trunk.parameters())
    assert trunk.compile_units() == [trunk]

    order = []
    for stage in trunk.trunk_output:
        for name, block in list(stage.named_children()):
            wrapped = nn.Sequential(block)
            wrapped.register_forward_hook(lambda module, *_: order.extend(module.children()))
            stage.register_module(name, wrapped)
    images = torch.randn(2, 3, 32, 32)
    trunk(images)
    assert order == units
    order.clear()
    trunk.features(images)
    assert order == units
    assert trunk.units() != units


def test_channels_last_gives_the_same_output():
    torch.manual_seed(0)
    trunk = RegNetY(**SMALL).double()
    same = copy.deepcopy(trunk).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(trunk(images), same(images.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem_stride": 4}, "stem_stride"),
        ({"first_stage_stride": 3}, "first_stage_stride"),
        ({"se_ratio": 0.0}, "se_ratio"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RegNetY(**SMALL, **change)


@pytest.mark.parametrize("group_width", [11, 16])
def test_padded_groups_change_nothing_but_the_kernel(group_width):
    """Outputs, gradients, names and the updates after them, with groups of 11 run as 16."""
    sizes = {**SMALL, "w_0": 24, "w_a": 40.0, "group_width": group_width}
    torch.manual_seed(0)
    plain = RegNetY(**sizes).double()
    padded = RegNetY(**sizes, pad_groups=8).double()
    padded.load_state_dict(plain.state_dict())
    widths: list[int] = []
    real = torch.nn.functional.conv2d

    def watched(x, weight, *more):
        widths.append(weight.shape[1] if more[4] > 1 else 0)
        return real(x, weight, *more)

    images = torch.randn(3, 3, 48, 40, dtype=torch.float64)
    expected = plain(images)
    torch.nn.functional.conv2d = watched
    try:
        got = padded(images)
    finally:
        torch.nn.functional.conv2d = real
    assert max(widths) == 16
    torch.testing.assert_close(got, expected)
    for out in (got, expected):
        out.square().sum().backward()
    for (name, ours), theirs in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(padded.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with pytest.raises(ValueError, match="pad_groups=0"):
        RegNetY(**sizes, pad_groups=0)
