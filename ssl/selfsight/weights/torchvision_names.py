"""Our trunks as torchvision's models: names are the same but for ViTs."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import regnet, resnet, vision_transformer

from selfsight.trunks.geometry import regnet_geometry
from selfsight.trunks.libraries import TorchvisionTrunk
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.resnet import ResNet
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights.files import WeightsError

Built = tuple[nn.Module, dict[str, Tensor], str]
_IDENTITY = "model.fc = torch.nn.Identity()"


def own(node: Mapping[str, Any], trunk: TorchvisionTrunk) -> Built:
    """A model of torchvision itself: names without ours before them."""
    options = node.get("options") or {}
    again = TorchvisionTrunk(name=node["name"], options=options)
    tensors = {n.removeprefix("network."): t for n, t in trunk.state_dict().items()}
    with torch.device("meta"):
        fresh = torchvision.models.get_model(node["name"], weights=None, **options)
    taken = [n for n, m in fresh.named_modules() if isinstance(m, nn.Linear) and _gone(trunk, n)]
    place = re.sub(r"\.(\d+)", r"[\1]", taken[-1])
    written = "".join(f", {k}={v!r}" for k, v in options.items())
    built = f'torchvision.models.get_model("{node["name"]}"{written}); '
    return again.network, tensors, f"{built}model.{place} = torch.nn.Identity()"


def _gone(trunk: TorchvisionTrunk, name: str) -> bool:
    try:
        return isinstance(trunk.network.get_submodule(name), nn.Identity)
    except AttributeError:
        return False


def translated(node: Mapping[str, Any], trunk: Trunk) -> Built:
    """The model of torchvision that a trunk of ours is, tensors in its names, and how to build it.

    Raises:
        WeightsError: torchvision has none.
    """
    if isinstance(trunk, RegNetY):
        return _regnet(node, trunk)
    if isinstance(trunk, ResNet):
        return _resnet(node, trunk)
    if isinstance(trunk, VisionTransformer):
        return _vit(node, trunk)
    raise WeightsError(f"torchvision has no network like {type(trunk).__name__}")


def _regnet(node: Mapping[str, Any], trunk: RegNetY) -> Built:
    rule = {k: node[k] for k in ("depth", "w_0", "w_a", "w_m", "group_width")}
    strides = (node.get("stem_stride", 2), node.get("first_stage_stride", 2))
    if strides != (2, 2) or node.get("in_channels", 3) != 3:
        raise WeightsError("torchvision's RegNets have strides of 2 and take 3 channels")
    geometry = regnet_geometry(**rule)
    arguments = {
        "depths": list(geometry.depths),
        "widths": list(geometry.widths),
        "group_widths": list(geometry.group_widths),
        "bottleneck_multipliers": [1.0] * 4,
        "strides": [2] * 4,
        "se_ratio": node.get("se_ratio", 0.25),
    }
    stem = node.get("stem_width", 32)
    model = regnet.RegNet(regnet.BlockParams(**arguments), num_classes=1, stem_width=stem)
    model.fc = nn.Identity()  # type: ignore[assignment]
    built = "torchvision.models.regnet.RegNet(torchvision.models.regnet.BlockParams("
    built += ", ".join(f"{k}={v}" for k, v in arguments.items())
    return model, dict(trunk.state_dict()), f"{built}), stem_width={stem}); {_IDENTITY}"


def _resnet(node: Mapping[str, Any], trunk: ResNet) -> Built:
    if node.get("widen", 1) != 1 or node.get("small_images") or node.get("in_channels", 3) != 3:
        raise WeightsError(
            "torchvision's ResNets are not widened as a whole, have a stem for large images, and "
            "take 3 channels"
        )
    kind = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[node["block"]]
    more = {"groups": node.get("groups", 1), "width_per_group": node.get("group_width", 64)}
    model = resnet.ResNet(getattr(resnet, kind), list(node["depths"]), num_classes=1, **more)
    model.fc = nn.Identity()  # type: ignore[assignment]
    written = ", ".join(f"{k}={v}" for k, v in more.items())
    built = f"torchvision.models.resnet.ResNet(torchvision.models.resnet.{kind}, "
    built += f"{list(node['depths'])}, {written}); {_IDENTITY}"
    return model, dict(trunk.state_dict()), built


_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "self_attention.out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def _vit(node: Mapping[str, Any], trunk: VisionTransformer) -> Built:
    lacking = [
        word
        for word, there in (
            ("registers", trunk.register_tokens is not None),
            ("LayerScale", node.get("layer_scale") is not None),
            ("a gated MLP", node.get("mlp", "gelu") != "gelu"),
            ("other than 3 channels", node.get("in_channels", 3) != 3),
        )
        if there
    ]
    if lacking:
        raise WeightsError(f"torchvision's ViTs lack {' and '.join(lacking)}: use to=timm or to=hf")
    arguments = {
        "image_size": node.get("image_size", 224),
        "patch_size": node.get("patch_size", 16),
        "num_layers": node["depth"],
        "num_heads": node["heads"],
        "hidden_dim": node["width"],
        "mlp_dim": int(node["width"] * node.get("mlp_ratio", 4.0)),
    }
    model = vision_transformer.VisionTransformer(**arguments, num_classes=1)
    model.heads = nn.Identity()  # type: ignore[assignment]
    tensors: dict[str, Tensor] = {}
    for name, tensor in trunk.state_dict().items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            place = f"encoder.layers.encoder_layer_{match[1]}"
            if match[2] == "attn.qkv":
                tensors[f"{place}.self_attention.in_proj_{match[3]}"] = tensor
            else:
                tensors[f"{place}.{_BLOCK[match[2]]}.{match[3]}"] = tensor
        elif name != "mask_token":
            tensors[_TOP.get(name, name.replace("norm.", "encoder.ln."))] = tensor
    written = ", ".join(f"{k}={v}" for k, v in arguments.items())
    built = f"torchvision.models.VisionTransformer({written}); "
    return model, tensors, built + "model.heads = torch.nn.Identity()"


_TOP = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.weight": "conv_proj.weight",
    "patch_embed.proj.bias": "conv_proj.bias",
}
