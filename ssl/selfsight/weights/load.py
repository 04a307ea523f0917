"""Weights into trunks: any file in a known layout, loudly and wholly."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from selfsight.build import build
from selfsight.trunks.libraries import TimmTrunk, TorchvisionTrunk
from selfsight.trunks.trunk import Trunk
from selfsight.weights.files import WeightFile, WeightsError, read_weights
from selfsight.weights.layouts import (
    IMAGENET,
    Found,
    detect,
    flatten,
    stated_pixels,
    without_words,
)
from selfsight.weights.report import Report

_COUNTERS = "num_batches_tracked"  # BatchNorm's; older files lack them, and nothing depends on them


@dataclass(frozen=True)
class LoadedTrunk:
    """A trunk with the weights of a file, and what the file says of its use."""

    trunk: Trunk
    mean: tuple[float, ...]
    """Channel means to subtract from pixels in [0, 1]."""
    std: tuple[float, ...]
    image_size: int
    description: str
    """One line: layout, size, and where the normalisation is known from."""
    report: Report
    found: Found
    """Node, licence, and the tensors that are not the trunk's (heads)."""


def load_trunk(
    path: Path | str, *, allow_partial: bool = False, prefer: str = "teacher"
) -> LoadedTrunk:
    """Build the trunk that a file of weights is of, and load it.

    Args:
        path: a `trunk.safetensors`, a run's folder or checkpoint, or a file or folder of another
            code in one of the layouts of `layouts.py`.
        allow_partial: also where tensors of the trunk are missing: those stay as initialised.
        prefer: `teacher` or `student`, where a file has both.

    Raises:
        WeightsError: one sentence about the file.
    """
    file = read_weights(path)
    found = find(file, prefer)
    try:
        trunk = build(found.node)
    except ValueError as error:
        raise WeightsError(f"{file.path} cannot be built: {error}") from None
    assert isinstance(trunk, Trunk)
    if isinstance(trunk, TimmTrunk | TorchvisionTrunk) and found.family == "library":
        found = replace(found, **library_tensors(trunk, found.others))
    report = fill(trunk, found, file.path, allow_partial=allow_partial)
    parameters = sum(p.numel() for p in trunk.parameters())
    size = _image_size(file, found)
    described = (
        f"{found.layout}, {type(trunk).__name__} of {parameters:,} parameters, {size} pixels"
    )
    described += f", normalisation {found.pixels_from}"
    return LoadedTrunk(trunk.eval(), found.mean, found.std, size, described, report, found)


def init_trunk(
    trunk: Trunk, path: Path | str, *, allow_partial: bool = False, prefer: str = "teacher"
) -> tuple[Report, Found]:
    """Load a file of weights into a trunk that is there already.

    Raises:
        WeightsError: one sentence about the file, or about what does not fit.
    """
    file = read_weights(path)
    ours = "own" in file.metadata or "trunk" in file.metadata
    if isinstance(trunk, TimmTrunk | TorchvisionTrunk) and not ours:
        found = _library_found(file, trunk)
    else:
        found = find(file, prefer)
    return fill(trunk, found, file.path, allow_partial=allow_partial), found


def find(file: WeightFile, prefer: str = "teacher") -> Found:
    """What trunk a file holds: our own, that of a layout, or a model of timm that it names.

    Raises:
        WeightsError: one sentence.
    """
    if "trunk" in file.metadata or file.metadata.get("own") == "checkpoint":
        return _own(file, prefer)
    try:
        return detect(file, prefer)
    except WeightsError:
        name = file.config.get("architecture", file.metadata.get("architecture"))
        if not isinstance(name, str):
            raise
        kind = file.metadata.get("library", "TimmTrunk")
        node = {"_target_": f"selfsight.trunks.libraries.{kind}", "name": name}
        pixels = stated_pixels(file) or (*IMAGENET, "assumed: ImageNet's")
        content = dict(flatten(file.content))
        return Found("timm", "library", {}, node, content, 0, *pixels)


def _own(file: WeightFile, prefer: str) -> Found:
    """A trunk file of ours, or a checkpoint of a run."""
    content: dict[str, Tensor] = dict(file.content)
    if "trunk" in file.metadata:
        node, pixels = json.loads(file.metadata["trunk"]), json.loads(file.metadata["pixels"])
        mean, std = tuple(pixels["mean"]), tuple(pixels["std"])
        return Found(
            "selfsight",
            "own",
            content,
            node,
            {},
            0,
            mean,
            std,
            "the file",
            file.metadata.get("licence"),
        )
    if "config" not in file.metadata:
        raise WeightsError(f"the checkpoint {file.path} has no config.yaml of its run beside it")
    config = OmegaConf.create(file.metadata["config"])
    assert OmegaConf.is_dict(config)
    node = OmegaConf.to_container(config.model.trunk, resolve=True)
    assert isinstance(node, dict)
    prefix = "student_trunk." if prefer == "student" else "trunk."
    tensors = {n.removeprefix(prefix): t for n, t in content.items() if n.startswith(prefix)}
    if not tensors:
        raise WeightsError(f"the checkpoint {file.path} holds no {prefix.rstrip('.')}")
    others = {n: t for n, t in content.items() if not n.startswith(prefix)}
    mean, std = (tuple(others[f"pixel_{k}"].flatten().tolist()) for k in ("mean", "std"))
    keys = {str(k): v for k, v in node.items()}
    return Found("selfsight checkpoint", "own", tensors, keys, others, 0, mean, std, "the file")


# ------------------------------------------------------------------------------------- filling


@torch.no_grad()
def fill(trunk: Trunk, found: Found, path: Path, *, allow_partial: bool = False) -> Report:
    """Copy tensors into a trunk by name, positions resampled to its grid.

    Raises:
        WeightsError: a shape differs, tensors are missing, or the file's trunk has more than this
            one; nothing has been changed then.
    """
    own = trunk.state_dict()
    given = dict(found.tensors)
    for name in ("mask_token",):  # used in pretraining only
        if name in given and name not in own:
            given.pop(name)
    dropped = [name for name in found.tensors if name not in given]
    resized: list[str] = []
    if "pos_embed" in own and "pos_embed" in given:
        resampled = _resampled(given["pos_embed"], own["pos_embed"].shape)
        if resampled is not given["pos_embed"]:
            given["pos_embed"], resized = resampled, ["pos_embed"]
    wanted = [name for name in own if not name.endswith(_COUNTERS)]
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in own and not name.endswith(_COUNTERS)]
    for name in wanted:
        if name in given and given[name].shape != own[name].shape:
            raise WeightsError(
                f"{path} is of another architecture: {name} is {_size(given[name])} in it and "
                f"{_size(own[name])} in the trunk ({type(trunk).__name__} by model=)"
            )
    usual = [name for name in missing if name != "mask_token"]
    if (usual or extra) and not allow_partial:
        what = []
        if usual:
            what.append(f"lacks {len(usual)} of {len(wanted)} tensors, such as {usual[0]}")
        if extra:
            what.append(f"has {len(extra)} that the trunk lacks, such as {extra[0]}")
        raise WeightsError(
            f"{path} does not fit the trunk: it {' and '.join(what)}; set allow_partial=true to "
            "load what fits"
        )
    taken = [name for name in own if name in given]
    for name in taken:
        own[name].copy_(given[name])
    counted = [name for name in taken if not name.endswith(_COUNTERS)]
    return Report(
        layout=found.layout,
        wanted=len(wanted),
        loaded=len(counted),
        renamed=min(found.originals, len(counted)),
        resized=tuple(resized),
        missing=tuple(missing),
        unused=(*found.others, *dropped, *extra),
    )


def _resampled(positions: Tensor, shape: torch.Size) -> Tensor:
    """Positions of a class token and a square grid, for another grid."""
    theirs, ours = math.isqrt(positions.shape[1] - 1), math.isqrt(shape[1] - 1)
    square = theirs**2 == positions.shape[1] - 1 and ours**2 == shape[1] - 1
    if positions.shape == shape or positions.shape[2] != shape[2] or not square:
        return positions
    table = positions[:, 1:].float().reshape(1, theirs, theirs, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, (ours, ours), mode="bicubic", antialias=True)
    return torch.cat((positions[:, :1].float(), table.flatten(2).transpose(1, 2)), dim=1)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _image_size(file: WeightFile, found: Found) -> int:
    size = found.node.get("image_size") or file.metadata.get("image_size")
    pretrained = file.config.get("pretrained_cfg") or {}
    if size is None and isinstance(shape := pretrained.get("input_size"), list):
        size = shape[-1]
    crop = file.preprocessor.get("crop_size")
    if size is None and isinstance(crop, Mapping):
        size = crop.get("height")
    return int(size or 224)


# --------------------------------------------------------------------------- library's models


def _library_found(file: WeightFile, trunk: TimmTrunk | TorchvisionTrunk) -> Found:
    plain = without_words(flatten(file.content))
    layout = "timm" if isinstance(trunk, TimmTrunk) else "torchvision"
    return replace(Found(layout, "library", {}, {}, plain), **library_tensors(trunk, plain))


def library_tensors(
    trunk: TimmTrunk | TorchvisionTrunk, plain: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The tensors of a library's model under the names of our trunk around it: as they are, or
    through the translation that timm has for the files of the model's authors."""
    network: Any = trunk.network
    names = list(network.state_dict())
    first = names[0]
    prefixes = [n.removesuffix(first) for n in plain if n == first or n.endswith(f".{first}")]
    prefix = min(prefixes, key=len, default="")
    inner = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    fitting = {n: t for n, t in inner.items() if n in set(names)}
    renamed = 0 if not prefix else len(fitting)
    module = sys.modules[type(network).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None)
    if len(fitting) < len(names) and translate is not None:
        try:
            theirs = translate(dict(inner), network)
        except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, AssertionError):
            theirs = {}  # not of these authors
        translated = {n: t for n, t in theirs.items() if n in set(names)}
        if len(translated) > len(fitting):
            fitting, renamed = translated, sum(1 for n in translated if n not in inner)
            inner = {}
    others = {n: t for n, t in inner.items() if n not in fitting}
    others |= {n: t for n, t in plain.items() if not n.startswith(prefix)}
    return {
        "tensors": {f"network.{name}": tensor for name, tensor in fitting.items()},
        "others": others,
        "originals": renamed,
    }
