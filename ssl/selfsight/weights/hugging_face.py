"""Our trunks as models of transformers: ViT, DINOv2 (with LayerScale), and with registers; ResNet
and RegNet."""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.trunks.geometry import regnet_geometry
from selfsight.trunks.regnet import RegNetY
from selfsight.trunks.resnet import ResNet
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights.files import WeightsError

_VIT_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def translated(node: Mapping[str, Any], trunk: Trunk) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors under the names of published files (`encoder.layer.`).

    Raises:
        WeightsError: transformers has no such model.
    """
    if isinstance(trunk, VisionTransformer):
        return _vit(node, trunk)
    if isinstance(trunk, RegNetY):
        return _regnet(node, trunk)
    if isinstance(trunk, ResNet):
        return _resnet(node, trunk)
    raise WeightsError(f"transformers has no network like {type(trunk).__name__}")


def preprocessor(mean: Sequence[float], std: Sequence[float], size: int) -> dict[str, Any]:
    """preprocessor_config.json: resize the shorter side, cut the centre, normalise."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def reloaded(folder: Path) -> Callable[[Tensor], Tensor]:
    """The folder as transformers loads it; features of images.

    Raises:
        WeightsError: transformers is not installed, or tensors are missing or left over.
    """
    if find_spec("transformers") is None:
        raise WeightsError("to=hf needs transformers: uv sync --extra export")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    amiss = [
        name
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in info[key]
        if not str(name).startswith("pooler")  # of the classifier; ViT's only
    ]
    if amiss:
        raise WeightsError(f"transformers does not take the tensors, such as {amiss[0]}")
    model.eval()

    def run(images: Tensor) -> Tensor:
        out = model(pixel_values=images)
        hidden = out.last_hidden_state
        return hidden[:, 0] if hidden.dim() == 3 else out.pooler_output.flatten(1)

    return run


def _vit(
    node: Mapping[str, Any], trunk: VisionTransformer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    scaled = node.get("layer_scale") is not None
    registers = node.get("register_tokens", 0)
    gated = node.get("mlp", "gelu") == "swiglu"
    if (registers or gated) and not scaled:
        raise WeightsError(
            "transformers has registers and gated MLPs only with LayerScale (DINOv2): use to=timm"
        )
    ratio = node.get("mlp_ratio", 4.0)
    config: dict[str, Any] = {
        "hidden_size": node["width"],
        "num_hidden_layers": node["depth"],
        "num_attention_heads": node["heads"],
        "image_size": node.get("image_size", 224),
        "patch_size": node.get("patch_size", 16),
        "num_channels": node.get("in_channels", 3),
        "layer_norm_eps": node.get("norm_eps", 1e-6),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if scaled:
        if ratio != int(ratio):
            raise WeightsError(f"transformers' DINOv2 needs a whole mlp_ratio, not {ratio}")
        kind = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
        config |= {
            "model_type": "dinov2_with_registers" if registers else "dinov2",
            "mlp_ratio": int(ratio),
            "use_swiglu_ffn": gated,
            "layerscale_value": node["layer_scale"],
        }
        config |= {"num_register_tokens": registers} if registers else {"use_mask_token": True}
    else:
        kind = "ViTModel"
        config |= {"model_type": "vit", "intermediate_size": int(node["width"] * ratio)}
    config["architectures"] = [kind]
    tensors: dict[str, Tensor] = {}
    names = _DINOV2_BLOCK if scaled else _VIT_BLOCK
    for name, tensor in trunk.state_dict().items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name):
            place, part, leaf = f"encoder.layer.{match[1]}", match[2], match[3]
            if part == "attn.qkv":
                for key, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    tensors[f"{place}.attention.attention.{key}.{leaf}"] = piece
            elif part.startswith("ls"):
                tensors[f"{place}.layer_scale{part[2]}.lambda1"] = tensor
            else:
                tensors[f"{place}.{names[part]}.{leaf}"] = tensor
        elif name in _VIT_TOP:
            tensors[_VIT_TOP[name]] = tensor
        else:
            part, _, leaf = name.rpartition(".")
            tensors[f"{_VIT_TOP[part]}.{leaf}"] = tensor
    if scaled and "embeddings.mask_token" not in tensors:
        tensors["embeddings.mask_token"] = torch.zeros(1, node["width"])
    if not scaled:
        tensors.pop("embeddings.mask_token", None)
    return config, tensors


def _convolutions(pairs: Mapping[str, str], name: str) -> str:
    for ours, theirs in pairs.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}.{name.removeprefix(f'{ours}.')}"
    raise AssertionError(name)


_REGNET = {
    "f.a.0": "layer.0.convolution",
    "f.a.1": "layer.0.normalization",
    "f.b.0": "layer.1.convolution",
    "f.b.1": "layer.1.normalization",
    "f.se.fc1": "layer.2.attention.0",
    "f.se.fc2": "layer.2.attention.2",
    "f.c.0": "layer.3.convolution",
    "f.c.1": "layer.3.normalization",
    "proj.0": "shortcut.convolution",
    "proj.1": "shortcut.normalization",
}


def _regnet(node: Mapping[str, Any], trunk: RegNetY) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if node.get("stem_stride", 2) != 2 or node.get("first_stage_stride", 2) != 2:
        raise WeightsError("transformers' RegNets have a stem and a first stage of stride 2")
    if node.get("se_ratio", 0.25) != 0.25:
        raise WeightsError("transformers' RegNets have se_ratio=0.25")
    rule = {k: node[k] for k in ("depth", "w_0", "w_a", "w_m", "group_width")}
    geometry = regnet_geometry(**rule)
    config = {
        "architectures": ["RegNetModel"],
        "model_type": "regnet",
        "num_channels": node.get("in_channels", 3),
        "embedding_size": node.get("stem_width", 32),
        "hidden_sizes": list(geometry.widths),
        "depths": list(geometry.depths),
        "groups_width": node["group_width"],
        "layer_type": "y",
        "hidden_act": "relu",
        "downsample_in_first_stage": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in trunk.state_dict().items():
        if match := re.fullmatch(r"stem\.([01])\.(.+)", name):
            part = ("convolution", "normalization")[int(match[1])]
            tensors[f"embedder.embedder.{part}.{match[2]}"] = tensor
            continue
        match = re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)\.(.+)", name)
        assert match
        place = f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}"
        tensors[f"{place}.{_convolutions(_REGNET, match[3])}"] = tensor
    return config, tensors


_RESNET = {
    **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
    **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
    "downsample.0": "shortcut.convolution",
    "downsample.1": "shortcut.normalization",
}


def _resnet(node: Mapping[str, Any], trunk: ResNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if node.get("widen", 1) != 1 or node.get("small_images") or node.get("groups", 1) != 1:
        raise WeightsError(
            "transformers' ResNets are not widened, have no groups, and a stem for large images"
        )
    if node.get("group_width", 64) != 64:
        raise WeightsError("transformers' ResNets have group_width=64")
    expansion = 4 if node["block"] == "bottleneck" else 1
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": node.get("in_channels", 3),
        "embedding_size": 64,
        "hidden_sizes": [64 * expansion * 2**stage for stage in range(4)],
        "depths": list(node["depths"]),
        "layer_type": node["block"],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in trunk.state_dict().items():
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name):
            place = f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}"
            tensors[f"{place}.{_convolutions(_RESNET, match[3])}"] = tensor
        else:
            part = "convolution" if name.startswith("conv1") else "normalization"
            tensors[f"embedder.embedder.{part}.{name.partition('.')[2]}"] = tensor
    return config, tensors
