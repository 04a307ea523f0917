"""The arguments of a trunk, read off the shapes of its tensors (under our names)."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from selfsight.trunks.geometry import gated_width, regnet_geometry
from selfsight.weights.files import WeightsError

CONF = Path(__file__).parents[3] / "conf" / "model"
_REGNET, _RESNET, _VIT = (
    "selfsight.trunks.regnet.RegNetY",
    "selfsight.trunks.resnet.ResNet",
    "selfsight.trunks.vit.VisionTransformer",
)
# Attention heads are not seen in shapes. Widths of ViTs whose heads have other than 64 channels.
_HEADS = {1280: 16, 1408: 16, 1664: 16}


def regnet_node(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `_target_` node of a RegNetY: that of conf/model which has these widths.

    Raises:
        WeightsError: no size of conf/model has them.
    """
    blocks: dict[tuple[int, int], Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)\.f\.b\.0\.weight", name):
            blocks[int(match[1]), int(match[2])] = tensor
    stages = sorted({stage for stage, _ in blocks})
    depths = tuple(sum(1 for stage, _ in blocks if stage == s) for s in stages)
    firsts = [next(t for (s, _), t in sorted(blocks.items()) if s == stage) for stage in stages]
    widths, groups = tuple(t.shape[0] for t in firsts), tuple(t.shape[1] for t in firsts)
    if not any(".f.se." in name for name in tensors):
        raise WeightsError("these are weights of a RegNetX, without squeeze-and-excitation")
    stem = tensors["stem.0.weight"]
    for path in sorted(CONF.glob("regnety_*.yaml")):
        trunk = OmegaConf.to_container(OmegaConf.load(path).trunk, resolve=False)
        assert isinstance(trunk, dict)
        rule = {k: trunk[k] for k in ("depth", "w_0", "w_a", "w_m", "group_width")}
        found = regnet_geometry(**rule)
        if (found.depths, found.widths, found.group_widths) == (depths, widths, groups):
            sizes = {"in_channels": stem.shape[1], "stem_width": stem.shape[0]}
            return {str(k): v for k, v in trunk.items()} | sizes
    raise WeightsError(
        f"no RegNetY of conf/model has depths {list(depths)} and widths {list(widths)} as these "
        "weights have; torchvision's 800MF and 8GF are wider than published: use model=torchvision"
    )


def resnet_node(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `_target_` node of a ResNet."""
    stem, first = tensors["conv1.weight"], tensors["layer1.0.conv2.weight"]
    depths = [
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in tensors
    widen = stem.shape[0] // 64
    groups = first.shape[0] // first.shape[1]
    return {
        "_target_": _RESNET,
        "block": "bottleneck" if bottleneck else "basic",
        "depths": depths,
        "widen": widen,
        "groups": groups,
        "group_width": first.shape[0] // (widen * groups) if bottleneck else 64,
        "in_channels": stem.shape[1],
        "small_images": stem.shape[2] == 3,
    }


def vit_node(tensors: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The `_target_` node of a ViT. `hints` are arguments that shapes do not show.

    Raises:
        WeightsError: the positions are not those of a square grid and a class token.
    """
    embedding, positions = tensors["patch_embed.proj.weight"], tensors.get("pos_embed")
    width, channels, patch, other = embedding.shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    if patch != other:
        raise WeightsError(f"patches of {patch}x{other} pixels are not square")
    if positions is None:
        raise WeightsError("this ViT has no learned positions")
    grid = math.isqrt(positions.shape[1] - 1)
    if grid**2 != positions.shape[1] - 1:
        raise WeightsError(
            f"{positions.shape[1]} positions are not those of a square grid and a class token"
        )
    gated = "blocks.0.mlp.w12.weight" in tensors
    last = tensors["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"]
    registers = tensors.get("register_tokens")
    return {
        "_target_": _VIT,
        "width": width,
        "depth": depth,
        "heads": _HEADS.get(width, max(1, width // 64)),
        "in_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_ratio": _gated_ratio(width, last.shape[1]) if gated else last.shape[1] / width,
        "mlp": "swiglu" if gated else "gelu",
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "register_tokens": 0 if registers is None else registers.shape[1],
        "mask_token": "mask_token" in tensors,
        **hints,
    }


def _gated_ratio(width: int, hidden: int) -> float:
    """A ratio of which `gated_width` makes `hidden`."""
    for ratio in (4.0, 2.0, 3.0, 6.0, 8.0, 1.5 * hidden / width):
        if gated_width(int(width * ratio)) == hidden:
            return ratio
    raise WeightsError(f"a gated MLP of {hidden} hidden channels cannot be built at width {width}")
