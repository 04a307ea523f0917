"""ResNet against torchvision's models with the same weights, and its contract."""

import inspect
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from selfsight.trunks.geometry_resnet import resnet_macs, resnet_parameters
from selfsight.trunks.resnet import ResNet

CONF = Path(__file__).parents[2] / "conf" / "model"
MODELS = sorted([*CONF.glob("resnet*.yaml"), *CONF.glob("resnext*.yaml")])
SMALL: dict[str, Any] = {"block": "bottleneck", "depths": [1, 1, 2, 1], "groups": 4}
# ours, torchvision's name, trunk parameters of torchvision's documentation less its classifier
THEIRS = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnext50": "resnext50_32x4d",
    "resnext101": "resnext101_32x8d",
}


def arguments_of(name: str) -> dict[str, Any]:
    node = cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    )
    trunk = node["trunk"]
    assert trunk.pop("_target_") == "selfsight.trunks.resnet.ResNet"
    return trunk | {"in_channels": 3}


@pytest.mark.parametrize(("name", "theirs"), THEIRS.items())
def test_names_and_shapes_are_torchvisions(name, theirs):
    with torch.device("meta"):
        ours = ResNet(**arguments_of(name))
        model: Any = torchvision.models.get_model(theirs)
        model.fc = torch.nn.Identity()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnext50"])
def test_equals_torchvision(name):
    torch.manual_seed(0)
    ours = ResNet(**arguments_of(name)).train()
    theirs: Any = torchvision.models.get_model(THEIRS[name]).train()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 64, 80)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and with the running averages that this pass left
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_torchvisions_wide_resnet_is_a_wider_group():
    with torch.device("meta"):
        wider: Any = arguments_of("resnet50") | {"group_width": 128}
        ours = ResNet(**wider)
        theirs: Any = torchvision.models.wide_resnet50_2()
        theirs.fc = torch.nn.Identity()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_file_lists_every_argument_and_builds(path):
    arguments = arguments_of(path.stem)
    assert list(arguments) == list(inspect.signature(ResNet).parameters)
    with torch.device("meta"):
        trunk = ResNet(**arguments)
    count = sum(p.numel() for p in trunk.parameters())
    assert count == resnet_parameters(**arguments)
    text = path.read_text()
    assert f"{count:,} parameters" in text
    assert f"{resnet_macs(224, 224, **arguments) / 1e9:.1f}G multiply-adds" in text
    assert f"widths: [{trunk.width}," in text


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (97, 45)])
def test_macs_equal_what_torch_counts(block, small, size):
    numbers: dict[str, Any] = {
        "block": block,
        "depths": [1, 2, 1, 1],
        "widen": 2,
        "small_images": small,
    }
    if block == "bottleneck":
        numbers |= {"groups": 8, "group_width": 16}
    with torch.device("meta"):
        trunk, images = ResNet(**numbers), torch.empty(2, 3, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(images)
    assert counter.get_total_flops() == 2 * 2 * resnet_macs(*size, **numbers)
    assert resnet_parameters(**numbers) == sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize(("small", "strides"), [(False, [4, 8, 16, 32]), (True, [1, 2, 4, 8])])
@pytest.mark.parametrize("size", [(64, 64), (70, 33)])
def test_features_have_the_stated_channels_and_strides(small, strides, size):
    trunk = ResNet(**SMALL, small_images=small).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = trunk.features(images)
        assert torch.equal(maps["c5"].mean((2, 3)), trunk(images))
    assert [info.stride for info in trunk.feature_info.values()] == strides
    for level, info in trunk.feature_info.items():
        side = [math.ceil(length / info.stride) for length in size]
        assert maps[level].shape == (2, info.channels, *side)


def test_units_are_all_blocks_in_order():
    trunk = ResNet(**SMALL)
    order = []
    for unit in trunk.units():
        unit.register_forward_hook(lambda module, *_: order.append(module))
    trunk(torch.randn(2, 3, 64, 64))
    assert order == trunk.units() and len(order) == 5


def test_zero_init_makes_blocks_begin_as_identity():
    trunk = ResNet(block="basic", depths=[2, 1, 1, 1], zero_init=True).eval()
    x = torch.rand(1, 64, 8, 8)
    with torch.no_grad():
        assert torch.equal(trunk.get_submodule("layer1")(x), x)


def test_init_weights_fills_everything_after_meta():
    with torch.device("meta"):
        trunk = ResNet(**SMALL)
    trunk.to_empty(device="cpu")
    for tensor in trunk.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    trunk.init_weights()
    for name, tensor in trunk.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("num_batches_tracked"):
            assert tensor == 0


def test_frozen_batch_norm_does_not_change_in_training():
    torch.manual_seed(0)
    trunk = ResNet(**SMALL)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = trunk.eval()(images)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    trunk.freeze_batch_norm()
    out = trunk.train()(images)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, before[name]), name
    trained = {name for name, p in trunk.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in trunk.named_parameters() if p.dim() == 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "plain"}, "basic or bottleneck"),
        ({"depths": [1, 1, 1]}, "four numbers"),
        ({"widen": 0}, "widen=0"),
        ({"block": "basic"}, "groups"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{**SMALL, **change})
