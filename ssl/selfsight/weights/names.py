"""Names of published weights, turned into those of our trunks.

Each function takes tensors by name, as its layout has them, and returns those of a trunk under our
names: torchvision's for RegNets and ResNets, DINOv2's for ViTs. What it does not return is not the
trunk's. Nothing here looks at a trunk object; sizes are read off by `sizes.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def renamed(
    tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], *, keep: bool = False
) -> Tensors:
    """Names that a rule matches as a whole, rewritten by the first that does; others are left out,
    or kept as they are."""
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    out: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, target in compiled:
            if match := pattern.fullmatch(name):
                out[match.expand(target)] = tensor
                break
        else:
            if keep:
                out[name] = tensor
    return out


# ---------------------------------------------------------------------------------------- RegNet

_REGNET = [(r"(stem\.[01]\..+|trunk_output\.block\d\.block\d-\d+\..+)", r"\1")]
_REGNET_VISSL = [
    (r"(?:_feature_blocks\.)?conv1\.stem\.([01])\.(.+)", r"stem.\1.\2"),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.f\.se\.excitation\.0\.(.+)",
        r"trunk_output.block\1.block\1-\2.f.se.fc1.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.f\.se\.excitation\.2\.(.+)",
        r"trunk_output.block\1.block\1-\2.f.se.fc2.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.proj\.(weight|bias)",
        r"trunk_output.block\1.block\1-\2.proj.0.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.bn\.(.+)",
        r"trunk_output.block\1.block\1-\2.proj.1.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.f\.c\.(weight|bias)",
        r"trunk_output.block\1.block\1-\2.f.c.0.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.f\.final_bn\.(.+)",
        r"trunk_output.block\1.block\1-\2.f.c.1.\3",
    ),
    (
        r"(?:_feature_blocks\.)?res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.f\.([ab])\.([01])\.(.+)",
        r"trunk_output.block\1.block\1-\2.f.\3.\4.\5",
    ),
]
_TIMM_REGNET = {
    "downsample.conv": "proj.0",
    "downsample.bn": "proj.1",
    "conv1.conv": "f.a.0",
    "conv1.bn": "f.a.1",
    "conv2.conv": "f.b.0",
    "conv2.bn": "f.b.1",
    "se.fc1": "f.se.fc1",
    "se.fc2": "f.se.fc2",
    "conv3.conv": "f.c.0",
    "conv3.bn": "f.c.1",
}


def regnet(tensors: Mapping[str, Tensor]) -> Tensors:
    return renamed(tensors, _REGNET)


def regnet_vissl(tensors: Mapping[str, Tensor]) -> Tensors:
    """VISSL's, plain or with the parts that FSDP trunks put between stage and block."""
    return renamed(tensors, _REGNET_VISSL)


def regnet_timm(tensors: Mapping[str, Tensor]) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"stem\.(conv|bn)\.(.+)", name):
            out[f"stem.{int(match[1] == 'bn')}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"s(\d)\.b(\d+)\.(\w+\.\w+)\.(\w+)", name):
            stage, block, part, leaf = match.groups()
            if part in _TIMM_REGNET:
                place = f"trunk_output.block{stage}.block{stage}-{int(block) - 1}"
                out[f"{place}.{_TIMM_REGNET[part]}.{leaf}"] = tensor
    return out


_CONVOLUTION = {"convolution": "0", "normalization": "1"}
_HF_REGNET = {
    "layer.0": "f.a",
    "layer.1": "f.b",
    "layer.3": "f.c",
    "layer.2.attention.0": "f.se.fc1",
    "layer.2.attention.2": "f.se.fc2",
    "shortcut": "proj",
}


def regnet_hugging_face(tensors: Mapping[str, Tensor]) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"embedder\.embedder\.(\w+)\.(\w+)", name):
            out[f"stem.{_CONVOLUTION[match[1]]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)\.(\w+)", name):
            stage, block, part, leaf = match.groups()
            place = f"trunk_output.block{int(stage) + 1}.block{int(stage) + 1}-{block}"
            if part in _HF_REGNET:
                out[f"{place}.{_HF_REGNET[part]}.{leaf}"] = tensor
                continue
            part, _, kind = part.rpartition(".")
            if part in _HF_REGNET and kind in _CONVOLUTION:
                out[f"{place}.{_HF_REGNET[part]}.{_CONVOLUTION[kind]}.{leaf}"] = tensor
    return out


# ---------------------------------------------------------------------------------------- ResNet

_RESNET = [
    (r"(?:_feature_blocks\.)?((?:conv1|bn1)\.\w+)", r"\1"),
    (r"(?:_feature_blocks\.)?(layer[1-4]\.\d+\.(?:conv\d|bn\d|downsample\.[01])\.\w+)", r"\1"),
]


def resnet(tensors: Mapping[str, Tensor]) -> Tensors:
    """torchvision's, timm's, SwAV's and VISSL's."""
    return renamed(tensors, _RESNET)


def resnet_hugging_face(tensors: Mapping[str, Tensor]) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"embedder\.embedder\.(\w+)\.(\w+)", name):
            out[f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"] = tensor
        elif match := re.fullmatch(
            r"encoder\.stages\.(\d)\.layers\.(\d+)\.(layer\.\d|shortcut)\.(\w+)\.(\w+)", name
        ):
            stage, block, part, kind, leaf = match.groups()
            ours = f"downsample.{_CONVOLUTION[kind]}"
            if part != "shortcut":
                ours = f"{'conv' if kind == 'convolution' else 'bn'}{int(part[-1]) + 1}"
            out[f"layer{int(stage) + 1}.{block}.{ours}.{leaf}"] = tensor
    return out


# ------------------------------------------------------------------------------------------- ViT

_BLOCK = r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.(?:fc[12]|w12|w3))\.(?:weight|bias)|ls[12]\.gamma"
_VIT = [
    (r"(cls_token|pos_embed|mask_token|register_tokens)", r"\1"),
    (r"reg_token", "register_tokens"),
    (r"((?:patch_embed\.proj|norm)\.(?:weight|bias))", r"\1"),
    (rf"blocks\.(?:\d+\.)?(\d+)\.({_BLOCK})", r"blocks.\1.\2"),  # DINOv2 runs have chunks
]


def vit(tensors: Mapping[str, Tensor]) -> Tensors:
    """DINO's, DINOv2's and timm's."""
    out = renamed(tensors, _VIT)
    for name in [n for n in out if n.endswith("mlp.fc1.weight")]:
        block = name.removesuffix("fc1.weight")
        if (
            f"{block}fc2.weight" in out
            and out[name].shape[0] == 2 * out[f"{block}fc2.weight"].shape[1]
        ):
            for leaf in ("weight", "bias"):  # timm's packed SwiGLU
                out[f"{block}w12.{leaf}"] = out.pop(f"{block}fc1.{leaf}")
                out[f"{block}w3.{leaf}"] = out.pop(f"{block}fc2.{leaf}")
    positions = out.get("pos_embed")
    if positions is not None and positions.dim() == 3 and _is_square(positions.shape[1]):
        # timm has no position for the class token beside registers: it is in the token
        zero = positions.new_zeros(1, 1, positions.shape[2])
        out["pos_embed"] = torch.cat((zero, positions), dim=1)
    return out


_HF_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.down_proj": "mlp.w3",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_HF_JOINED = {
    "attn.qkv": ("attention.attention.{}", ("query", "key", "value")),
    "attn.qkv ": ("attention.{}", ("q_proj", "k_proj", "v_proj")),
    "mlp.w12": ("mlp.{}", ("gate_proj", "up_proj")),
}


def vit_hugging_face(tensors: Mapping[str, Tensor]) -> Tensors:
    """ViT (Google's, DINO's), DINOv2 and DINOv2 with registers of transformers, as in the files
    (`encoder.layer.`) and as in memory of version 5 (`layers.`)."""
    out: Tensors = {}
    blocks: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        if name in _HF_TOP:
            out[_HF_TOP[name]] = tensor
        elif match := re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", name):
            blocks.setdefault(match[1], {})[match[2]] = tensor
    for index, parts in blocks.items():
        for name, tensor in parts.items():
            part, _, leaf = name.rpartition(".")
            if part in _HF_BLOCK:
                ours = _HF_BLOCK[part]
                out[f"blocks.{index}.{ours}.{'gamma' if leaf == 'lambda1' else leaf}"] = tensor
        for ours, (place, theirs) in _HF_JOINED.items():
            for leaf in ("weight", "bias"):
                found = [parts.get(f"{place.format(name)}.{leaf}") for name in theirs]
                whole = [tensor for tensor in found if tensor is not None]
                if len(whole) == len(theirs):
                    out[f"blocks.{index}.{ours.strip()}.{leaf}"] = torch.cat(whole)
    mask = out.get("mask_token")
    if mask is not None and mask.dim() == 3:
        out["mask_token"] = mask[0]
    return out


_VIT_TORCHVISION = [
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.ln\.(.+)", r"norm.\1"),
]
_TORCHVISION_BLOCK = [
    (r"ln_([12])\.(.+)", r"norm\1.\2"),
    (r"self_attention\.in_proj_(weight|bias)", r"attn.qkv.\1"),
    (r"self_attention\.out_proj\.(.+)", r"attn.proj.\1"),
    (r"mlp\.(?:0|linear_1)\.(.+)", r"mlp.fc1.\1"),
    (r"mlp\.(?:3|linear_2)\.(.+)", r"mlp.fc2.\1"),
]


def vit_torchvision(tensors: Mapping[str, Tensor]) -> Tensors:
    rules = list(_VIT_TORCHVISION)
    for pattern, target in _TORCHVISION_BLOCK:
        shifted = re.sub(r"\\(\d)", lambda m: f"\\{int(m[1]) + 1}", target)
        rules.append((rf"encoder\.layers\.encoder_layer_(\d+)\.{pattern}", rf"blocks.\1.{shifted}"))
    return renamed(tensors, rules)


def _is_square(count: int) -> bool:
    return round(count**0.5) ** 2 == count


Translation = Callable[[Mapping[str, Tensor]], Tensors]
