"""Trunks of other libraries: any timm model and any torchvision classification model, by name.

The library's own network, without classifier, under `network`; so names in `state_dict()` are the
library's with `network.` before them. Weights are never downloaded here: `trunk.init=FILE` loads
them. Written from what both libraries say of their models, with a pass of a small image where they
say nothing.
"""

import copy
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk

_STRIDES = (4, 8, 16, 32)
_LISTS = (nn.Sequential, nn.ModuleList)


@final
class TimmTrunk(Trunk):
    """A timm model, e.g. `convnext_tiny`.

    Args:
        name: as in `timm.list_models()`.
        in_channels: channels of an image.
        options: more arguments of `timm.create_model`, e.g. {drop_path_rate: 0.1}.

    Levels of `features()`: of the maps that the model offers, the last one of each stride from 4
    to 32; a stride that it lacks is resampled from the map that comes nearest (of equally near
    ones a quarter of the depth on for each level) by bilinear interpolation.

    Raises:
        ValueError: timm is not installed, or has no such model, or cannot build it so.
    """

    def __init__(
        self, *, name: str, in_channels: int = 3, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if find_spec("timm") is None:
            raise ValueError("model=timm needs timm: uv sync --extra timm")
        import timm

        try:
            network: Any = timm.create_model(
                name, pretrained=False, num_classes=0, in_chans=in_channels, **(options or {})
            )
        except RuntimeError as error:
            raise ValueError(f"timm has no model {name} ({_first(error)})") from None
        except TypeError as error:
            raise ValueError(f"timm's {name} cannot be built so: {_first(error)}") from None
        self.network = network
        self.width = int(getattr(network, "head_hidden_size", None) or network.num_features)
        infos = [
            (int(info["num_chs"]), int(info["reduction"]))
            for info in getattr(network, "feature_info", None) or []
        ]
        self._taken = [_nearest(infos, stride, level) for level, stride in enumerate(_STRIDES)]
        self.feature_info = {
            level: FeatureLevel(channels=infos[index][0] if infos else 0, stride=stride)
            for level, stride, index in zip(LEVELS, _STRIDES, self._taken, strict=True)
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return what the model's classifier would take: (b, channels, h, w) to (b, width)."""
        return self.network(images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of strides 4 to 32, as `feature_info` says.

        Raises:
            ValueError: the model offers no feature maps.
        """
        if not hasattr(self.network, "forward_intermediates"):
            raise ValueError("this timm model offers no feature maps (no forward_intermediates)")
        wanted = sorted(set(self._taken))
        maps = self.network.forward_intermediates(images, indices=wanted, intermediates_only=True)
        found = dict(zip(wanted, maps, strict=True))
        return _resampled(images, {k: found[i] for k, i in zip(LEVELS, self._taken, strict=True)})

    def units(self) -> list[nn.Module]:
        """Return the model's blocks."""
        return _blocks(self.network)

    def compile_units(self) -> list[nn.Module]:
        """Return the whole trunk."""
        return [self]

    def init_weights(self) -> None:
        """Initialise as the model's layers do when they are made."""
        _reset(self.network)


@final
class TorchvisionTrunk(Trunk):
    """A torchvision classification model, e.g. `mobilenet_v3_large`.

    Args:
        name: as in `torchvision.models.list_models(torchvision.models)`.
        in_channels: channels of an image: 3.
        options: more arguments of the model's constructor.

    The classifier is replaced by what leaves its input as it is. Levels of `features()`: the last
    map of each stride, as `TimmTrunk` says, among the outputs of the model's parts.

    Raises:
        ValueError: torchvision has no such classification model, or cannot build it so.
    """

    def __init__(
        self, *, name: str, in_channels: int = 3, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        from torchvision import models

        if name not in models.list_models(module=models):
            raise ValueError(f"torchvision has no classification model {name}")
        if in_channels != 3:
            raise ValueError(f"torchvision's {name} takes 3 channels, not {in_channels}")
        try:
            network: Any = models.get_model(name, weights=None, **(options or {}))
        except TypeError as error:
            raise ValueError(f"torchvision's {name} cannot be built so: {_first(error)}") from None
        if hasattr(network, "aux_logits"):  # GoogLeNet, Inception: more classifiers, for training
            network.aux_logits = False
            for part in ("aux1", "aux2", "AuxLogits"):
                if hasattr(network, part):
                    setattr(network, part, None)
        self.width = _without_classifier(network, name)
        self.network = network
        self._parts = _maps_of(network)
        self._taken = [
            _nearest([(c, s) for _, c, s in self._parts], stride, level)
            for level, stride in enumerate(_STRIDES)
        ]
        self.feature_info = {
            level: FeatureLevel(channels=self._parts[index][1] if self._parts else 0, stride=stride)
            for level, stride, index in zip(LEVELS, _STRIDES, self._taken, strict=True)
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return what the model's classifier would take: (b, 3, h, w) to (b, width)."""
        return self.network(images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of strides 4 to 32, as `feature_info` says.

        Raises:
            ValueError: no part of the model gives a map.
        """
        if not self._parts:
            raise ValueError("this torchvision model has no parts that give feature maps")
        maps: dict[str, Tensor] = {}
        names = [self._parts[index][0] for index in self._taken]

        def keep(name: str, out: Tensor) -> None:
            maps[name] = out.movedim(-1, 1) if _channels_last(self.network) else out

        hooks = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: keep(name, out)
            )
            for name in set(names)
        ]
        try:
            self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return _resampled(images, {k: maps[name] for k, name in zip(LEVELS, names, strict=True)})

    def units(self) -> list[nn.Module]:
        """Return the model's blocks."""
        return _blocks(self.network)

    def compile_units(self) -> list[nn.Module]:
        """Return the whole trunk."""
        return [self]

    def init_weights(self) -> None:
        """Initialise as the model's layers do when they are made."""
        _reset(self.network)


# ------------------------------------------------------------------------------------- helpers


def measure(trunk: Mapping[str, Any]) -> dict[str, int]:
    """Return `width` and `parameters` of the trunk of a `_target_` node of this file.

    It is built on the meta device, which takes a second and no memory.

    Raises:
        ValueError: it cannot be built.
    """
    return dict(_measure(json.dumps(dict(trunk), sort_keys=True)))


@cache
def _measure(node: str) -> dict[str, int]:
    arguments = json.loads(node)
    kind = {"TimmTrunk": TimmTrunk, "TorchvisionTrunk": TorchvisionTrunk}[
        arguments.pop("_target_").rpartition(".")[2]
    ]
    with torch.device("meta"):
        built = kind(**arguments)
    return {"width": built.width, "parameters": sum(p.numel() for p in built.parameters())}


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _nearest(infos: list[tuple[int, int]], stride: int, level: int) -> int:
    """Index of the map for a stride; among maps of one stride, deeper ones for coarser levels."""
    if not infos:
        return 0
    best = min(abs(math.log2(reduction / stride)) for _, reduction in infos)
    near = [i for i, (_, r) in enumerate(infos) if abs(math.log2(r / stride)) == best]
    if len({reduction for _, reduction in infos}) == 1:  # a plain ViT: a quarter of it each
        return near[len(near) * (level + 1) // len(LEVELS) - 1]
    return near[-1]


def _resampled(images: Tensor, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring maps to the sizes of strides 4, 8, 16, 32."""
    h, w = images.shape[-2:]
    out: dict[str, Tensor] = {}
    for (level, x), stride in zip(maps.items(), _STRIDES, strict=True):
        size = (math.ceil(h / stride), math.ceil(w / stride))
        same = tuple(x.shape[-2:]) == size
        out[level] = x if same else F.interpolate(x, size, mode="bilinear", align_corners=False)
    return out


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are repeated: what plain lists hold, or stages, no one inside
    another. A network without any is cut into its children."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if type(child) in _LISTS:
                if any(type(c) in _LISTS or _holds_blocks(c) for c in child.children()):
                    walk(child)
                else:
                    found.extend(c for c in child.children() if any(True for _ in c.parameters()))
            elif _holds_blocks(child):
                walk(child)

    walk(network)
    if len(found) < len(LEVELS):
        found = [c for c in network.children() if sum(1 for _ in c.parameters()) > 1]
    return found or [network]


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a stage: among its children is a plain list of modules that have parts."""
    return any(
        type(child) in _LISTS and any(sum(1 for _ in c.children()) > 1 for c in child.children())
        for child in module.children()
    )


def _reset(network: nn.Module) -> None:
    if hasattr(network, "init_weights"):
        network.init_weights()  # pyright: ignore[reportCallIssue]
        return
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]


def _without_classifier(network: nn.Module, name: str) -> int:
    """Take the last linear layer out, in place; returns how many channels it took."""
    for part in ("fc", "classifier", "heads", "head"):
        module = getattr(network, part, None)
        if isinstance(module, nn.Linear):
            setattr(network, part, nn.Identity())
            return module.in_features
        if isinstance(module, nn.Sequential):
            last = max(i for i, m in enumerate(module) if not isinstance(m, nn.Softmax | nn.ReLU))
            layer = module[last]
            if isinstance(layer, nn.Linear):
                names = [n for n, _ in module.named_children()]
                setattr(module, names[last], nn.Identity())
                return layer.in_features
    raise ValueError(f"torchvision's {name} has no linear classifier to take off")


@torch.no_grad()
def _maps_of(network: nn.Module) -> list[tuple[str, int, int]]:
    """Name, channels and stride of every part (up to two levels deep) that gives a square map
    once, in the order in which they run; from one pass of a picture on the meta device."""
    side = 256
    seen: list[tuple[str, int, int]] = []
    probe = copy.deepcopy(network).to("meta").eval()
    last = _channels_last(network)

    def look(name: str, out: object) -> None:
        if not isinstance(out, Tensor) or out.dim() != 4:
            return
        shape = out.movedim(-1, 1).shape if last else out.shape
        if 1 < shape[2] == shape[3] < side and side % shape[2] == 0:
            seen.append((name, shape[1], side // shape[2]))

    for name, module in probe.named_modules():
        if name and name.count(".") < 2:
            module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
    try:
        probe(torch.empty(1, 3, side, side, device="meta"))
    except (RuntimeError, AssertionError, NotImplementedError):
        return []  # of a fixed size, e.g. a ViT
    names = [name for name, _, _ in seen]
    return [entry for entry in seen if names.count(entry[0]) == 1]


def _channels_last(network: nn.Module) -> bool:
    """torchvision's Swin transformers keep maps as (b, h, w, channels)."""
    return type(network).__name__ == "SwinTransformer"
