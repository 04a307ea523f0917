"""Trunks of timm and torchvision: their outputs, maps, blocks and refusals."""

from typing import Any

import pytest
import timm
import torch
import torchvision

from selfsight.build import compose
from selfsight.config import ConfigError, check
from selfsight.distributed.activation import checkpoint_activations
from selfsight.trunks.libraries import TimmTrunk, TorchvisionTrunk
from selfsight.trunks.trunk import Trunk


def right(trunk: Trunk, size: int = 64, units: int = 4) -> None:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert trunk(images).shape == (2, trunk.width)
        maps = trunk.features(images)
    assert [info.stride for info in trunk.feature_info.values()] == [4, 8, 16, 32]
    for level, info in trunk.feature_info.items():
        assert maps[level].shape == (2, info.channels, size // info.stride, size // info.stride)
    blocks = trunk.units()
    assert len(blocks) >= units
    checkpoint_activations(blocks)  # refuses a block inside another one
    trunk.train()(images).sum().backward()


@pytest.mark.parametrize("name", ["convnext_atto", "regnety_002", "mobilenetv3_small_050"])
def test_timm_models(name):
    torch.manual_seed(0)
    trunk = TimmTrunk(name=name).eval()
    theirs: Any = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(trunk.network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trunk(images), theirs(images))
    right(trunk)


def test_a_timm_vit_has_maps_of_each_quarter():
    trunk = TimmTrunk(name="vit_tiny_patch16_224", options={"img_size": 64}).eval()
    assert trunk._taken == [2, 5, 8, 11]
    right(trunk, units=12)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "mobilenet_v3_small", "swin_t"])
def test_torchvision_models(name):
    torch.manual_seed(0)
    trunk = TorchvisionTrunk(name=name).eval()
    theirs: Any = torchvision.models.get_model(name, num_classes=7).eval()
    missing, unexpected = theirs.load_state_dict(trunk.network.state_dict(), strict=False)
    assert not unexpected and all(m.split(".")[0] in ("fc", "classifier", "head") for m in missing)
    taken: list[torch.Tensor] = []
    last = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda _, args, __: taken.append(args[0]))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs(images)
        assert torch.equal(trunk(images), taken[0])
    right(trunk)


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="timm has no model convnext_att"):
        TimmTrunk(name="convnext_att")
    with pytest.raises(ValueError, match="cannot be built so"):
        TimmTrunk(name="resnet18", options={"colour": 1})
    with pytest.raises(ValueError, match="no classification model maskrcnn"):
        TorchvisionTrunk(name="maskrcnn_resnet50_fpn")
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        TorchvisionTrunk(name="resnet18", in_channels=1)
    with pytest.raises(ValueError, match="no linear classifier"):
        TorchvisionTrunk(name="squeezenet1_0")
    vit = TorchvisionTrunk(name="vit_b_32")
    with pytest.raises(ValueError, match="no parts that give feature maps"):
        vit.features(torch.zeros(1, 3, 224, 224))


def test_a_model_by_name_composes_with_its_width_and_parameters():
    config = check(compose("pretrain", ["model=timm", "model.name=regnety_002"]))
    assert config.model.trunk.name == "regnety_002"
    with torch.device("meta"):
        theirs: Any = timm.create_model("regnety_002", num_classes=0)
    assert config.model.trunk_parameters == sum(p.numel() for p in theirs.parameters())
    assert int(config.model.head.widths[0]) == theirs.num_features
    with pytest.raises(ConfigError, match="timm has no model regnety_02"):
        check(compose("pretrain", ["model=timm", "model.name=regnety_02"]))
