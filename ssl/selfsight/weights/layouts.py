"""Which layout a file of weights has, seen from its names and shapes: nobody is asked.

First containers are opened (VISSL's nests, `state_dict`, a student and a teacher), then what codes
put before names is taken off (`module.`, FSDP's words), then the first layout whose telling names
are there is taken. A layout says how its names become ours, and what its shapes do not show:
normalisation, the interpolation of positions, a licence that binds.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from selfsight.weights import names, sizes
from selfsight.weights.files import WeightFile, WeightsError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SEER_LICENCE = "SEER's weights: for non-commercial research only, as Meta's SEER licence says"

_WORDS = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_fpw_module|_orig_mod)\.")
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Found:
    """Weights of a trunk in our names."""

    layout: str
    family: str
    """`regnet`, `resnet` or `vit`; or `own` and `library`, whose `node` says which."""
    tensors: dict[str, Tensor]
    node: dict[str, Any]
    """The `_target_` node that builds the trunk."""
    others: dict[str, Tensor]
    """What is not the trunk's, by the names of the file without the words of wrappers."""
    originals: int = 0
    """Tensors of the trunk whose names in the file were other ones."""
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    pixels_from: str = "assumed: ImageNet's"
    licence: str | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Layout:
    """One way in which a family of trunks is named."""

    name: str
    family: str
    telling: tuple[str, ...]
    """Names that are all there, after the prefix of the trunk."""
    translate: names.Translation


LAYOUTS = (
    Layout(
        "VISSL RegNet",
        "regnet",
        ("conv1.stem.0.weight",),
        names.regnet_vissl,
    ),
    Layout(
        "torchvision RegNet",
        "regnet",
        ("stem.0.weight", "trunk_output.block1.block1-0.f.a.0.weight"),
        names.regnet,
    ),
    Layout(
        "timm RegNet",
        "regnet",
        ("stem.conv.weight", "s1.b1.conv1.conv.weight"),
        names.regnet_timm,
    ),
    Layout(
        "Hugging Face RegNet",
        "regnet",
        (
            "embedder.embedder.convolution.weight",
            "encoder.stages.0.layers.0.layer.2.attention.0.weight",
        ),
        names.regnet_hugging_face,
    ),
    Layout(
        "Hugging Face ResNet",
        "resnet",
        (
            "embedder.embedder.convolution.weight",
            "encoder.stages.0.layers.0.layer.1.convolution.weight",
        ),
        names.resnet_hugging_face,
    ),
    Layout("ResNet", "resnet", ("conv1.weight", "layer1.0.conv2.weight"), names.resnet),
    Layout("ViT", "vit", ("patch_embed.proj.weight", "cls_token"), names.vit),
    Layout(
        "Hugging Face ViT",
        "vit",
        ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"),
        names.vit_hugging_face,
    ),
    Layout(
        "torchvision ViT",
        "vit",
        ("conv_proj.weight", "class_token"),
        names.vit_torchvision,
    ),
)
# Names that tell of a ViT that ours is not, and what it has.
_BY_NAME = ": load it by its name in timm, with model=timm model.name=NAME trunk.init=FILE"
_FOREIGN = {
    r".*rope_embed\.periods|.*storage_tokens|embeddings\.patch_embeddings\.weight": (
        "rotary positions, which this ViT lacks (DINOv3's is vit_small_patch16_dinov3 or its like)"
    ),
    r".*dist_token|.*distillation_token": "a distillation token, which this ViT lacks",
    r".*attn\.(q_norm|k_norm)\..*": "normalised queries and keys, which this ViT lacks",
    r".*relative_position_bias_table": "relative positions, which this ViT lacks",
    r"(.*\.)?(norm_pre|pre_norm)\.weight": "a norm before its blocks, which this ViT lacks",
    r"(.*\.)?fc_norm\.weight": "a norm of its averaged tokens instead of the last norm",
    r".*patch_embed\.proj\.(conv|0)\..*|.*patch_embed\.backbone\..*": "a convolutional stem",
}


def detect(file: WeightFile, prefer: str = "teacher") -> Found:
    """Find the trunk in a file of weights of another code.

    Args:
        file: what was read.
        prefer: `teacher` or `student`, where a file has both.

    Raises:
        WeightsError: one sentence: the layout is not known, or it is of a trunk that cannot be
            built here.
    """
    flat = flatten(file.content)
    if not flat:
        raise WeightsError(f"{file.path} holds no tensors by name")
    plain = without_words(flat)
    for layout in LAYOUTS:
        prefixes = _prefixes(plain, layout.telling)
        if not prefixes:
            continue
        prefix = _chosen(prefixes, prefer)
        # Only what FSDP put between parts is left in names behind the prefix.
        inner = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
        others = {n: t for n, t in plain.items() if not n.startswith(prefix)}
        return _found(file, layout, inner, others, prefix, prefixes)
    if foreign := _foreign(plain):
        raise WeightsError(f"{file.path} is a ViT with {foreign}{_BY_NAME}")
    if any(name.endswith("stem.0.weight") or ".block1-0." in name for name in plain):
        raise WeightsError(f"{file.path} is a part of a RegNet: its stem or first block is missing")
    shown = ", ".join(list(plain)[:3])
    raise WeightsError(
        f"{file.path} is in no layout that is known here (its names begin with {shown}); a timm or "
        "torchvision model can be loaded by name, with model=timm model.name=NAME and trunk.init"
    )


def without_words(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the words that DDP, FSDP and torch.compile put into them."""
    return {_WORDS.sub("", name): tensor for name, tensor in flat.items()}


def flatten(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of nested mappings by dotted name, opened as far as containers go.

    Raises:
        WeightsError: it is a list of shards.
    """
    if {"shard_list", "slice_list"} & set(content):
        raise WeightsError(
            "this file lists the shards of a VISSL FSDP checkpoint: consolidate it with VISSL's "
            "extra_scripts/convert_sharded_checkpoint.py"
        )
    if isinstance(classy := content.get("classy_state_dict"), Mapping):
        base = classy.get("base_model", classy)
        inner = base.get("model", base) if isinstance(base, Mapping) else base
        if isinstance(inner, Mapping):
            return _tensors(inner)
    sides = {k: content[k] for k in ("student", "teacher") if isinstance(content.get(k), Mapping)}
    if sides:
        return _tensors(sides)
    for key in _CONTAINERS:
        if isinstance(inner := content.get(key), Mapping):
            return flatten(inner)
    return _tensors(content)


def _tensors(content: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping):
            out |= _tensors(value, f"{prefix}{name}.")
    return out


def _prefixes(plain: Mapping[str, Tensor], telling: tuple[str, ...]) -> list[str]:
    """What stands before all of the telling names, for each trunk in the file."""
    first = telling[0]
    found = [n.removesuffix(first) for n in plain if n == first or n.endswith(f".{first}")]
    return [p for p in found if all(f"{p}{name}" in plain for name in telling[1:])]


def _chosen(prefixes: list[str], prefer: str) -> str:
    preferred = [p for p in prefixes if prefer in p.split(".")]
    return sorted(preferred or prefixes, key=len)[0]


def _foreign(plain: Mapping[str, Tensor]) -> str | None:
    for pattern, text in _FOREIGN.items():
        if any(re.fullmatch(pattern, name) for name in plain):
            return text
    return None


def _found(
    file: WeightFile,
    layout: Layout,
    inner: dict[str, Tensor],
    others: dict[str, Tensor],
    prefix: str,
    prefixes: list[str],
) -> Found:
    notes = [f"of {len(prefixes)} trunks, {prefix.rstrip('.')}"] if len(prefixes) > 1 else []
    if layout.family == "vit" and (foreign := _foreign(inner)):
        raise WeightsError(f"{file.path} is a ViT with {foreign}{_BY_NAME}")
    tensors = layout.translate(inner)
    taken = {id(t) for t in tensors.values()}
    rest = {n: t for n, t in inner.items() if id(t) not in taken and not _consumed(n, layout)}
    build: Callable[[], dict[str, Any]] = {
        "regnet": lambda: sizes.regnet_node(tensors),
        "resnet": lambda: sizes.resnet_node(tensors),
        "vit": lambda: sizes.vit_node(tensors, _vit_hints(file, layout, inner, tensors)),
    }[layout.family]
    try:
        node = build()
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from None
    except (KeyError, StopIteration, IndexError, ZeroDivisionError, ValueError) as error:
        raise WeightsError(
            f"{file.path} looks like a {layout.name} but is not whole ({error})"
        ) from None
    same = sum(1 for name, tensor in inner.items() if tensors.get(name) is tensor)
    mean, std, source = _pixels(file, layout)
    name = layout.name
    if layout.name == "ResNet" and any("prototypes" in n for n in rest | others):
        name = "SwAV ResNet"
    elif layout.name == "ViT":
        name = _vit_name(rest | others, inner, prefix)
    licence = SEER_LICENCE if layout.name == "VISSL RegNet" else None
    for place in (file.config, file.metadata):
        licence = str(place.get("license") or place.get("licence") or "") or licence
    return Found(
        layout=name,
        family=layout.family,
        tensors=tensors,
        node=node,
        others=others | rest,
        originals=len(tensors) - (same if not prefix else 0),
        mean=mean,
        std=std,
        pixels_from=source,
        licence=licence,
        notes=tuple(notes),
    )


def _consumed(name: str, layout: Layout) -> bool:
    """Names whose tensors were joined or reshaped into one of ours."""
    if layout.name == "ViT":
        return name in ("pos_embed", "reg_token")
    joined = r".*\.(query|key|value|[qkv]_proj|gate_proj|up_proj)\.(weight|bias)|.*mask_token"
    return layout.name == "Hugging Face ViT" and re.fullmatch(joined, name) is not None


def _vit_name(rest: Mapping[str, Tensor], inner: Mapping[str, Tensor], prefix: str) -> str:
    if any("last_layer.weight_v" in n or "dino_head" in n for n in rest):
        return "DINO, with head"
    if "register_tokens" in inner or {"blocks.0.ls1.gamma", "mask_token"} <= set(inner):
        return "DINOv2"
    if "reg_token" in inner or "head.weight" in inner:
        return "timm ViT"
    return "DINO ViT" if "blocks.0.ls1.gamma" not in inner else "timm ViT"


def _vit_hints(
    file: WeightFile, layout: Layout, inner: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Arguments of a ViT that shapes do not show."""
    config = file.config
    hints: dict[str, Any] = {"norm_eps": 1e-6, "position_offset": 0.0, "position_antialias": False}
    if layout.name == "Hugging Face ViT":
        first = layout.telling[0]
        v1 = any("layernorm_before" in name for name in inner) or first not in inner
        hints["norm_eps"] = float(config.get("layer_norm_eps", 1e-12 if v1 else 1e-6))
    elif layout.name == "ViT":
        name = _vit_name({}, inner, "")
        timm = name == "timm ViT" or "architecture" in config
        registers = "register_tokens" in tensors
        hints["position_antialias"] = timm or registers
        hints["position_offset"] = 0.0 if timm or registers else 0.1
    if heads := config.get("num_attention_heads"):
        hints["heads"] = int(heads)
    return hints | json.loads(file.metadata.get("vit", "{}"))  # of a file that we wrote


Pixels = tuple[tuple[float, ...], tuple[float, ...], str]


def stated_pixels(file: WeightFile) -> Pixels | None:
    """Mean and deviation that the file, or one beside it, says its weights expect; and which."""
    own = {k: json.loads(file.metadata[k]) for k in ("mean", "std") if k in file.metadata}
    known = [
        (own, "mean", "std", "the file"),
        (file.preprocessor, "image_mean", "image_std", "preprocessor_config.json"),
        (file.config.get("pretrained_cfg", {}), "mean", "std", "config.json"),
    ]
    for place, mean, std, source in known:
        if isinstance(place, Mapping) and mean in place and std in place:
            return tuple(map(float, place[mean])), tuple(map(float, place[std])), source
    return None


def _pixels(file: WeightFile, layout: Layout) -> Pixels:
    """Mean and deviation that the weights expect, and where that is known from."""
    if (stated := stated_pixels(file)) is not None:
        return stated
    origin = str(file.config.get("_name_or_path", ""))
    if file.config.get("model_type") == "vit" and "dino" not in origin:
        return *HALF, "assumed: Google's, 0.5"
    if layout.family == "regnet" or layout.name == "ResNet":
        return *IMAGENET, "ImageNet's, as all of this layout"
    return *IMAGENET, "assumed: ImageNet's"
