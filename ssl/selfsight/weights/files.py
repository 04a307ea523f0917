"""Files of weights, read without running anything that is in them.

safetensors files hold nothing but tensors. Files of `torch.save` are pickles: they are read with
`weights_only`, which builds tensors and plain containers and refuses everything else, but for the
few classes of plain data in `HARMLESS`, which released files hold beside their tensors. What cannot
be used is told in one sentence.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfsight.distributed.checkpoint import CheckpointError, Reader, latest
from selfsight.distributed.payload import read_header

HARMLESS: list[Any] = [
    argparse.Namespace,  # DINO's full files keep their arguments
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("float32")),
    type(np.dtype("int64")),
]
_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")  # Hugging Face's
_TORCH = (b"PK", b"\x80")  # a zip archive, and a bare pickle of older versions


class WeightsError(ValueError):
    """A file of weights that cannot be used; its message is one sentence for the console."""


@dataclass(frozen=True)
class WeightFile:
    """What a file or folder of weights holds."""

    path: Path
    content: Mapping[str, Any]
    """Tensors by name, or containers that hold such mappings."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file; of an own checkpoint, what a trunk file would have."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json beside it: Hugging Face's or timm's."""
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    """preprocessor_config.json beside it."""


def read_weights(path: Path | str) -> WeightFile:
    """Read a file of weights, a run's folder, one of its checkpoints, or a Hugging Face folder.

    Raises:
        WeightsError: one sentence that names the file and says what it is instead.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise WeightsError(f"there is no file of weights {path}")
    return _with_neighbours(path, *_read_file(path))


def _read_folder(path: Path) -> WeightFile:
    if (path / "trunk.safetensors").is_file():
        return read_weights(path / "trunk.safetensors")
    if (path / "manifest.json").is_file():
        return _read_checkpoint(path)
    if (path / "checkpoints").is_dir():
        if found := latest(path / "checkpoints"):
            return _read_checkpoint(found)
        raise WeightsError(f"the run {path} has neither trunk.safetensors nor a whole checkpoint")
    for name in _NAMES:
        if (path / name).is_file():
            return read_weights(path / name)
    for index in sorted(path.glob("*.index.json")):  # in several files
        files = sorted(set(_json(index).get("weight_map", {}).values()))
        parts = [_read_file(path / str(file))[0] for file in files]
        tensors = {name: value for part in parts for name, value in part.items()}
        return _with_neighbours(index, tensors, {})
    raise WeightsError(
        f"the folder {path} holds no weights: neither a run's trunk.safetensors or checkpoints, "
        "nor a model.safetensors"
    )


def _read_checkpoint(path: Path) -> WeightFile:
    """The method's tensors of an own checkpoint, and its run's configuration."""
    try:
        with Reader(path) as reader:
            tensors = {
                name.removeprefix("method/"): reader.read(name).clone()
                for name in reader.shapes
                if name.startswith("method/")
            }
    except CheckpointError as error:
        raise WeightsError(f"the checkpoint {path} cannot be read: {error}") from None
    metadata = {"own": "checkpoint"}
    config = path.parents[1] / "config.yaml"
    if config.is_file():
        metadata["config"] = config.read_text()
    return WeightFile(path, tensors, metadata)


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The content of one file, and its metadata."""
    if not path.is_file():
        raise WeightsError(f"there is no file of weights {path}")
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip()[:200].lower()
    if not head:
        raise WeightsError(f"{path} is empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise WeightsError(
            f"{path} is a web page (HTML), not weights: the download was an error page or a log-in"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    if head.startswith(_TORCH):
        return _read_torch(path), {}
    raise WeightsError(f"{path} is neither a safetensors file nor one of torch.save")


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    try:
        return load_file(path), read_header(path)[1]
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise WeightsError(
            f"{path} is cut short, damaged, or no safetensors file ({_first(error)})"
        ) from None


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that others wrote
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if match := re.search(r"GLOBAL ([\w.]+)", text):
            raise WeightsError(
                f"{path} holds Python objects beside its tensors ({match.group(1)}); nothing of it "
                "was run: save its state_dict alone, as safetensors, where it comes from"
            ) from None
        raise WeightsError(f"{path} is cut short or damaged ({_first(error)})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({_first(error)})") from None
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not weights by name")
    return content


def _with_neighbours(
    path: Path, content: Mapping[str, Any], metadata: Mapping[str, str]
) -> WeightFile:
    return WeightFile(
        path,
        content,
        metadata,
        config=_json(path.with_name("config.json")),
        preprocessor=_json(path.with_name("preprocessor_config.json")),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
