"""Weights out: a trunk in the names of another library, checked by that library.

What is written is loaded again by the library it is for, and its outputs on random images are held
against ours: a difference is an error, and the file is taken away again. The library is given back
in three lines that use the result.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.distributed.payload import write_tensors
from selfsight.trunks.libraries import TimmTrunk, TorchvisionTrunk
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vit import VisionTransformer
from selfsight.weights import graphs, hugging_face, timm_names, torchvision_names
from selfsight.weights.files import WeightsError
from selfsight.weights.load import LoadedTrunk, load_trunk

FORMS = ("selfsight", "timm", "torchvision", "hf", "onnx", "export")
_UNSEEN = ("heads", "norm_eps", "position_offset", "position_antialias", "layer_scale")
TOLERANCE = 1e-5  # of the largest output, or of 1 if that is less


@dataclass(frozen=True)
class Exported:
    """What was written, and how near its outputs are to ours."""

    path: Path
    difference: float
    """Largest difference of an output, over the largest output or 1."""
    snippet: str
    """Three lines that use the result."""


def export(loaded: LoadedTrunk, out: Path, to: str = "selfsight") -> Exported:
    """Write a trunk for another library, load it there, and compare.

    Args:
        loaded: what `load_trunk` gives.
        out: a file; for `hf` a folder.
        to: one of `FORMS`.

    Raises:
        WeightsError: one sentence: the library has no such network, is not installed, or its
            outputs differ; nothing is left behind then.
    """
    if to not in FORMS:
        raise WeightsError(f"to={to} is not one of {', '.join(FORMS)}")
    if out.exists():
        raise WeightsError(f"{out} exists already: choose another out=")
    if not out.parent.is_dir():
        raise WeightsError(f"there is no folder {out.parent} for out={out}")
    trunk = loaded.trunk.eval()
    part = out.with_name(f".{out.name}.part")
    _remove(part)
    try:
        if to == "hf":
            part.mkdir()
        run, snippet = _writer(to)(loaded, part)
        images = _images(trunk, loaded, to)
        with torch.no_grad():
            ours, theirs = trunk(images), run(images)
        difference = compare(ours, theirs, to)
        part.replace(out)
    except OSError as error:
        raise WeightsError(f"{out} cannot be written ({error.strerror or error})") from None
    finally:
        _remove(part)
    return Exported(out, difference, snippet.replace("FILE", str(out)))


def compare(ours: Tensor, theirs: Tensor, to: str) -> float:
    """The largest difference of outputs over the largest output, or over 1.

    Raises:
        WeightsError: it is above `TOLERANCE`.
    """
    if ours.shape != theirs.shape:
        raise WeightsError(
            f"to={to} gives outputs of {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        )
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    if not difference <= TOLERANCE:
        raise WeightsError(
            f"to={to} does not give the same outputs: they differ by {difference:.1e} of the "
            "largest; nothing was written"
        )
    return difference


Run = Callable[[Tensor], Tensor]
Writer = Callable[[LoadedTrunk, Path], tuple[Run, str]]


def _writer(to: str) -> Writer:
    return {
        "selfsight": _selfsight,
        "timm": _timm,
        "torchvision": _torchvision,
        "hf": _hugging_face,
        "onnx": lambda loaded, path: graphs.onnx(loaded.trunk, _one(loaded), path),
        "export": lambda loaded, path: graphs.torch_export(loaded.trunk, _one(loaded), path),
    }[to]


def _selfsight(loaded: LoadedTrunk, path: Path) -> tuple[Run, str]:
    pixels = {
        "channels": len(loaded.mean), "bits": 8, "mean": loaded.mean, "std": loaded.std
    }  # fmt: skip
    metadata = {
        "format": "pt",
        "trunk": json.dumps(loaded.found.node),
        "pixels": json.dumps(pixels),
        "image_size": str(loaded.image_size),
        "source": loaded.found.layout,
    }
    if loaded.found.licence:
        metadata["licence"] = loaded.found.licence
    write_tensors(path, loaded.trunk.state_dict(), metadata)
    again = load_trunk(path).trunk
    return again, (
        "from selfsight.weights.load import load_trunk\n"
        'loaded = load_trunk("FILE")\n'
        "features = loaded.trunk(images)  # normalised with loaded.mean and loaded.std"
    )


def _timm(loaded: LoadedTrunk, path: Path) -> tuple[Run, str]:
    trunk = loaded.trunk
    if isinstance(trunk, TimmTrunk):
        model, tensors, built = timm_names.own(loaded.found.node, trunk)
    else:
        model, tensors, built = timm_names.translated(loaded.found.node, trunk)
    _write(path, tensors, loaded)
    return _reloaded(model, path, "timm"), _snippet("import timm, torch", built)


def _torchvision(loaded: LoadedTrunk, path: Path) -> tuple[Run, str]:
    trunk = loaded.trunk
    if isinstance(trunk, TorchvisionTrunk):
        model, tensors, built = torchvision_names.own(loaded.found.node, trunk)
    else:
        model, tensors, built = torchvision_names.translated(loaded.found.node, trunk)
    _write(path, tensors, loaded)
    return _reloaded(model, path, "torchvision"), _snippet("import torch, torchvision", built)


def _hugging_face(loaded: LoadedTrunk, path: Path) -> tuple[Run, str]:
    config, tensors = hugging_face.translated(loaded.found.node, loaded.trunk)
    _write(path / "model.safetensors", tensors, loaded)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    preprocessor = hugging_face.preprocessor(loaded.mean, loaded.std, loaded.image_size)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    run = hugging_face.reloaded(path)
    pooled = "last_hidden_state[:, 0]"
    if not isinstance(loaded.trunk, VisionTransformer):
        pooled = "pooler_output.flatten(1)"
    return run, (
        "import transformers\n"
        'model = transformers.AutoModel.from_pretrained("FILE").eval()\n'
        f"features = model(images).{pooled}"
    )


def _write(path: Path, tensors: dict[str, Tensor], loaded: LoadedTrunk) -> None:
    node = loaded.found.node
    metadata = {"format": "pt", "mean": json.dumps(loaded.mean), "std": json.dumps(loaded.std)}
    if isinstance(loaded.trunk, VisionTransformer):  # what shapes do not show
        metadata["vit"] = json.dumps({k: node[k] for k in _UNSEEN if k in node})
    elif isinstance(loaded.trunk, TimmTrunk | TorchvisionTrunk):
        metadata |= {"architecture": node["name"], "library": type(loaded.trunk).__name__}
    if loaded.found.licence:
        metadata["licence"] = loaded.found.licence
    write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, metadata)


def _reloaded(model: nn.Module, path: Path, library: str) -> nn.Module:
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise WeightsError(f"{library} does not take the tensors: {lines[-1].strip()}") from None
    return model.eval()


def _snippet(first: str, built: str) -> str:
    return (
        f"{first}; from safetensors.torch import load_file\n"
        f"model = {built}\n"
        'model.load_state_dict(load_file("FILE")); features = model.eval()(images)'
    )


def _one(loaded: LoadedTrunk) -> Tensor:
    """Two images of the size that a graph is made for."""
    generator = torch.Generator().manual_seed(0)
    channels = int(loaded.found.node.get("in_channels", 3))
    size = loaded.image_size
    return torch.randn(2, channels, size, size, generator=generator)


def _images(trunk: Trunk, loaded: LoadedTrunk, to: str) -> Tensor:
    """Random images to compare on: graphs at the size they were made for, and convolutional trunks
    at a small one; three of them, so that a graph of two images would be found out."""
    fixed = to in ("onnx", "export") or hasattr(trunk, "pos_embed")
    fixed = fixed or isinstance(trunk, TimmTrunk | TorchvisionTrunk)
    size = loaded.image_size if fixed else min(96, loaded.image_size)
    channels = int(loaded.found.node.get("in_channels", 3))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator)


def _remove(path: Path) -> Any:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
