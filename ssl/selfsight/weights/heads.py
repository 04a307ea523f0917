"""Heads that files of weights hold beside their trunks, into the heads of a method.

SwAV's projection and prototypes (SwAV, VISSL, our checkpoints), DINO's (DINO, DINOv2, ours). A head
whose shapes differ from the file's stays as it is, and that is said.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfsight.heads.projection import ProjectionHead
from selfsight.heads.prototypes import Prototypes

_PROJECTION = re.compile(r"(?:.*\.)?projection_head\.(\d+\..+)")
_PROTOTYPES = re.compile(r"(?:.*\.)?prototypes(?:\.prototypes)?\.?(\d*)\.weight")
_DINO = re.compile(r"((?:.*\.)?)(mlp\.\d+\.(?:weight|bias)|last_layer\.weight_[gv])")
_PATCHES = ("ibot", "patch")


@dataclass(frozen=True)
class HeadReport:
    """Heads of a method, how many of them took the file's weights, and why others did not."""

    loaded: int
    of: int
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return self.loaded == self.of

    def text(self) -> str:
        text = f"{self.loaded} of {self.of} heads loaded"
        return text + (f" ({'; '.join(self.notes)})" if self.notes else "")


def load_heads(method: nn.Module, others: Mapping[str, Tensor]) -> HeadReport:
    """Load what a file has beside its trunk into the heads of `method`, in place.

    Args:
        method: its modules that are projections, prototypes or DINO heads are looked for.
        others: tensors of the file that are not the trunk's.
    """
    projection: dict[str, Tensor] = {}
    prototypes: dict[int, Tensor] = {}
    dino: dict[str, dict[str, Tensor]] = {}
    for name, tensor in others.items():
        if match := _PROJECTION.fullmatch(name):
            projection.setdefault(f"projection_head.{match[1]}", tensor)
        elif match := _PROTOTYPES.fullmatch(name):
            prototypes.setdefault(int(match[1] or 0), tensor)
        elif match := _DINO.fullmatch(name):
            dino.setdefault(match[1], {})[match[2]] = tensor
    loaded, of, notes, seen = 0, 0, [], 0
    for path, module in method.named_modules():
        if isinstance(module, ProjectionHead):
            given = projection
        elif isinstance(module, Prototypes):
            given = {"weight": prototypes[seen]} if seen in prototypes else {}
            seen += 1
        elif hasattr(module, "mlp") and hasattr(module, "last_layer"):
            given = _nearest(dino, path)
        else:
            continue
        of += 1
        if problem := _fill(module, given):
            notes.append(f"{path} {problem}")
        else:
            loaded += 1
    return HeadReport(loaded, of, tuple(notes))


def _nearest(dino: Mapping[str, dict[str, Tensor]], path: str) -> dict[str, Tensor]:
    """Of the file's DINO heads that for a method's: of the same side, and for images or patches."""
    patches = any(word in path for word in _PATCHES)
    student = path.startswith("student")
    fitting = [p for p in dino if any(word in p for word in _PATCHES) == patches]
    fitting.sort(key=lambda p: ("student" in p) != student)
    return dino[fitting[0]] if fitting else {}


@torch.no_grad()
def _fill(module: nn.Module, given: Mapping[str, Tensor]) -> str | None:
    """Copy tensors into a head; what speaks against it, and then nothing is changed."""
    own = module.state_dict()
    if not given:
        return "has none in the file"
    for name, tensor in own.items():
        if name not in given and not name.endswith("num_batches_tracked"):
            return f"differs: the file's has no {name}"
        if name in given and given[name].shape != tensor.shape:
            shapes = tuple(given[name].shape), tuple(tensor.shape)
            return f"differs: {name} is {shapes[0]} in the file and {shapes[1]} here"
    if extra := [name for name in given if name not in own]:
        return f"differs: the file's has {extra[0]} too"
    for name, tensor in own.items():
        if name in given:
            tensor.copy_(given[name])
    if isinstance(module, Prototypes):
        module.normalize()
    return None
