"""Our trunks as timm's models."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from selfsight.trunks.libraries import TimmTrunk
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.resnet import ResNet
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights.files import WeightsError

Built = tuple[nn.Module, dict[str, Tensor], str]
_REGNET = {
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.fc1": "se.fc1",
    "f.se.fc2": "se.fc2",
    "f.c.0": "conv3.conv",
    "f.c.1": "conv3.bn",
    "proj.0": "downsample.conv",
    "proj.1": "downsample.bn",
}


def own(node: Mapping[str, Any], trunk: TimmTrunk) -> Built:
    """A model of timm itself: names without ours before them."""
    again = TimmTrunk(**{k: v for k, v in node.items() if k != "_target_"})
    tensors = {n.removeprefix("network."): t for n, t in trunk.state_dict().items()}
    options = "".join(f", {k}={v!r}" for k, v in (node.get("options") or {}).items())
    return again.network, tensors, f'timm.create_model("{node["name"]}", num_classes=0{options})'


def translated(node: Mapping[str, Any], trunk: Trunk) -> Built:
    """The model of timm that a trunk of ours is, tensors in its names, and how to build it.

    Raises:
        WeightsError: timm has none, or is not installed.
    """
    if find_spec("timm") is None:
        raise WeightsError("to=timm needs timm: uv sync --extra timm")
    if isinstance(trunk, RegNetY):
        return _regnet(node, trunk)
    if isinstance(trunk, ResNet):
        return _resnet(node, trunk)
    if isinstance(trunk, VisionTransformer):
        return _vit(node, trunk)
    raise WeightsError(f"timm has no network like {type(trunk).__name__}")


def _regnet(node: Mapping[str, Any], trunk: RegNetY) -> Built:
    from timm.models import regnet

    if node.get("stem_stride", 2) != 2 or node.get("first_stage_stride", 2) != 2:
        raise WeightsError("timm's RegNets have a stem and a first stage of stride 2")
    arguments = {
        "depth": node["depth"],
        "w0": node["w_0"],
        "wa": node["w_a"],
        "wm": node["w_m"],
        "group_size": node["group_width"],
        "se_ratio": node.get("se_ratio", 0.25),
        "stem_width": node.get("stem_width", 32),
    }
    channels = node.get("in_channels", 3)
    model = regnet.RegNet(regnet.RegNetCfg(**arguments), in_chans=channels, num_classes=0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in trunk.state_dict().items():
        if match := re.fullmatch(r"stem\.([01])\.(.+)", name):
            tensors[f"stem.{('conv', 'bn')[int(match[1])]}.{match[2]}"] = tensor
            continue
        match = re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)\.(.+)\.(\w+)", name)
        assert match, name
        place = f"s{match[1]}.b{int(match[2]) + 1}"
        tensors[f"{place}.{_REGNET[match[3]]}.{match[4]}"] = tensor
    written = ", ".join(f"{k}={v}" for k, v in arguments.items())
    built = f"timm.models.regnet.RegNet(timm.models.regnet.RegNetCfg({written}), "
    return model, tensors, built + f"in_chans={channels}, num_classes=0)"


def _resnet(node: Mapping[str, Any], trunk: ResNet) -> Built:
    from timm.models import resnet

    if node.get("widen", 1) != 1 or node.get("small_images"):
        raise WeightsError(
            "timm's ResNets are not widened as a whole, and have a stem for large images"
        )
    kind = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[node["block"]]
    more = {
        "cardinality": node.get("groups", 1),
        "base_width": node.get("group_width", 64),
        "in_chans": node.get("in_channels", 3),
        "num_classes": 0,
    }
    model = resnet.ResNet(getattr(resnet, kind), tuple(node["depths"]), **more)
    written = ", ".join(f"{k}={v}" for k, v in more.items())
    built = (
        f"timm.models.resnet.ResNet(timm.models.resnet.{kind}, {tuple(node['depths'])}, {written})"
    )
    return model, dict(trunk.state_dict()), built


def _vit(node: Mapping[str, Any], trunk: VisionTransformer) -> Built:
    from timm.layers.mlp import SwiGLUPacked
    from timm.models import vision_transformer

    registers = node.get("register_tokens", 0)
    gated = node.get("mlp", "gelu") == "swiglu"
    hidden = int(node["width"] * node.get("mlp_ratio", 4.0))
    if gated:
        hidden = trunk.get_parameter("blocks.0.mlp.w12.weight").shape[0]
    arguments: dict[str, Any] = {
        "img_size": node.get("image_size", 224),
        "patch_size": node.get("patch_size", 16),
        "in_chans": node.get("in_channels", 3),
        "num_classes": 0,
        "embed_dim": node["width"],
        "depth": node["depth"],
        "num_heads": node["heads"],
        "mlp_ratio": hidden / node["width"],
    }
    if node.get("layer_scale") is not None:
        arguments["init_values"] = node["layer_scale"]
    if registers:
        arguments |= {"reg_tokens": registers, "no_embed_class": True}
    classes: dict[str, Any] = {}
    written = "".join(f"{k}={v}, " for k, v in arguments.items())
    if gated:
        classes = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        written += "mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU, "
    eps = node.get("norm_eps", 1e-6)
    if eps != 1e-6:
        classes["norm_layer"] = lambda width, **kw: nn.LayerNorm(width, eps=eps, **kw)
        written += f"norm_layer=lambda width, **kw: torch.nn.LayerNorm(width, eps={eps}, **kw), "
    model = vision_transformer.VisionTransformer(**arguments, **classes)
    tensors = {
        re.sub(r"mlp\.w12\.", "mlp.fc1.", re.sub(r"mlp\.w3\.", "mlp.fc2.", name)): tensor
        for name, tensor in trunk.state_dict().items()
        if name != "mask_token"
    }
    if registers:  # the class token's position goes into the token
        positions = tensors["pos_embed"]
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:].clone()
    return model, tensors, f"timm.models.VisionTransformer({written.rstrip(', ')})"
