"""Which part of which tensor each rank writes, and how any layout is read into any other one.

A tensor is given as it lies on the ranks: a plain one is the same on all of them, a DTensor is cut
into chunks along the dimensions of its mesh, or repeated along them. Each part is written once, by
one of the ranks that hold it, so that the ranks share the work. A file that lacks some of a tensor
says so in its metadata, under `parts`: name to [shape of the whole, offset of the part].
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from selfsight.distributed.checkpoint_folder import CheckpointError, read_manifest, verify
from selfsight.distributed.payload import DTYPES, read_header

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor."""

    local: Tensor
    """It shares the tensor's memory."""
    shape: tuple[int, ...]
    """Of the whole."""
    offset: tuple[int, ...]
    """Of the part's first element in the whole."""
    holders: tuple[int, ...]
    """The ranks that hold the same part."""

    @property
    def whole(self) -> bool:
        return tuple(self.local.shape) == self.shape


@torch.no_grad()
def part_of(name: str, tensor: Tensor, world_size: int) -> Part | None:
    """What this rank holds of `tensor`; None where it is not in the tensor's mesh.

    Raises:
        ValueError: it is laid out in a way that cannot be stored.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), shape, (0,) * len(shape), tuple(range(world_size)))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    offset, size = [0] * len(shape), list(shape)
    ranks = mesh.mesh
    for axis, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            dim, here = placement.dim % len(shape), coordinate[axis]
            chunk = -(-size[dim] // mesh.size(axis))
            start = min(here * chunk, size[dim])
            offset[dim] += start
            size[dim] = min(chunk, size[dim] - start)
            ranks = ranks.narrow(axis, here, 1)
        elif type(placement) is not Replicate:
            raise ValueError(f"tensor {name} is placed as {placement}, which cannot be stored.")
    if 0 in shape:
        ranks = mesh.mesh  # nothing is cut
    local = tensor.to_local().detach()
    if list(local.shape) != size:
        raise ValueError(
            f"tensor {name} has a part of shape {tuple(local.shape)} on this rank, and its layout "
            f"{tensor.placements} gives {tuple(size)}."
        )
    return Part(local, shape, tuple(offset), tuple(ranks.flatten().tolist()))


def to_write(
    tensors: Mapping[str, Tensor], rank: int, world_size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that this rank writes, by name, and the metadata of its file.

    The holders of a part reach the same conclusion on who writes it: in order of falling size, the
    one that has the least so far.

    Raises:
        ValueError: a tensor is laid out in a way, or of a dtype, that cannot be stored.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} of dtype {tensor.dtype} cannot be stored.")
    held = {name: part_of(name, tensor, world_size) for name, tensor in tensors.items()}
    loads: dict[tuple[int, ...], list[int]] = {}
    own: dict[str, Tensor] = {}
    partial: dict[str, Any] = {}
    for name, part in sorted(held.items(), key=lambda item: (-_bytes(item[1]), item[0])):
        if part is None:
            continue
        load = loads.setdefault(part.holders, [0] * len(part.holders))
        writer = load.index(min(load))
        load[writer] += max(1, _bytes(part))
        if part.holders[writer] == rank and (part.local.numel() or part.whole):
            own[name] = part.local
            if not part.whole:
                partial[name] = [part.shape, part.offset]
    return own, {"parts": json.dumps(partial)} if partial else {}


def _bytes(part: Part | None) -> int:
    return part.local.numel() * part.local.element_size() if part else 0


@dataclass(frozen=True)
class _Stored:
    """A part as it lies in a file."""

    file: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Reader:
    """The tensors of one checkpoint, read one by one, whole or in part. A context manager.

    Args:
        path: the folder of the checkpoint.
        manifest: its manifest, where it has been read; None reads it.
        checked: True where `latest` or `verify` has read every byte already.

    Raises:
        CheckpointError: see `verify`; or a tensor is not there as a whole.
    """

    def __init__(
        self, path: Path | str, *, manifest: Mapping[str, Any] | None = None, checked: bool = False
    ) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = dict(
            manifest or (read_manifest(self.path) if checked else verify(self.path))
        )
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shape of every tensor, as a whole, by name."""
        self._stored: dict[str, list[_Stored]] = {}
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        for file in self.manifest["files"]:
            self._index(file)
        for name, parts in self._stored.items():
            if len({part.offset for part in parts}) < len(parts):
                raise CheckpointError(f"{self.path} has a part of {name} in two files")
            if sum(math.prod(part.shape) for part in parts) != math.prod(self.shapes[name]):
                raise CheckpointError(f"{self.path} lacks a part of {name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._open.clear()

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The whole tensor `name`. In host memory it may map the file: copy it rather than keep it,
        and a change to it does not reach the file.

        Raises:
            CheckpointError: the file cannot be read.
        """
        parts = self._stored[name]
        if len(parts) == 1:
            return self._take(parts[0], name, None).to(device)
        pieces = [self._take(part, name, None) for part in parts]
        whole = torch.empty(self.shapes[name], dtype=pieces[0].dtype, device=device)
        for part, piece in zip(parts, pieces, strict=True):
            whole[_box(part.offset, part.shape)].copy_(piece)
        return whole

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy tensor `name`, or what this rank holds of it, into `tensor`, which may be a DTensor
        of any layout. The shapes of the wholes must be the same.

        Raises:
            CheckpointError: the file cannot be read.
        """
        assert tuple(tensor.shape) == self.shapes[name], name
        part = part_of(name, tensor, 1)
        if part is None or part.local.numel() == 0:
            return
        for stored in self._stored[name]:
            ends = zip(stored.offset, stored.shape, part.offset, part.local.shape, strict=True)
            bounds = [(max(a, c), min(a + b, c + d)) for a, b, c, d in ends]
            if any(start >= end for start, end in bounds):
                continue
            source = tuple(
                slice(start - first, end - first)
                for (start, end), first in zip(bounds, stored.offset, strict=True)
            )
            target = tuple(
                slice(start - first, end - first)
                for (start, end), first in zip(bounds, part.offset, strict=True)
            )
            part.local[target].copy_(self._take(stored, name, source))

    def _index(self, file: str) -> None:
        try:
            shapes, metadata = read_header(self.path / file)
            partial = json.loads(metadata.get("parts", "{}"))
            for name, shape in shapes.items():
                whole, offset = map(tuple, partial.get(name, (shape, (0,) * len(shape))))
                fits = all(
                    0 <= start <= start + length <= limit
                    for start, length, limit in zip(offset, shape, whole, strict=True)
                )
                if not fits or self.shapes.setdefault(name, whole) != whole:
                    raise ValueError(f"it holds a part of another {name}")
                self._stored.setdefault(name, []).append(_Stored(file, shape, offset))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read ({error})") from error

    def _take(self, stored: _Stored, name: str, box: Box | None) -> Tensor:
        """A part, or the box of it. A part that is taken whole maps the file."""
        path = self.path / stored.file
        try:
            if stored.file not in self._open:
                file = safe_open(path, framework="pt")
                self._open[stored.file] = self._files.enter_context(file)
            file = self._open[stored.file]
            if box is None or box == _box((0,) * len(stored.shape), stored.shape):
                return file.get_tensor(name)
            return file.get_slice(name)[box]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error


def _box(offset: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))


def load_into(
    tensors: Mapping[str, Tensor], path: Path | str, *, checked: bool = False
) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint that any number of ranks wrote in any layout.

    Every rank calls it for what it holds; nothing is exchanged.

    Args:
        tensors: name to tensor, plain or DTensor, on any device.
        path: the folder of one checkpoint.
        checked: True where `latest` or `verify` has read every byte already.

    Returns:
        The manifest with `step`, `scalars`, `config_hash`, ...

    Raises:
        CheckpointError: see `verify`; or names or shapes differ, and nothing was changed.
    """
    with Reader(path, checked=checked) as reader:
        if problem := difference(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}, reader.shapes
        ):
            raise CheckpointError(f"the checkpoint {path} is of another model: {problem}")
        for name, tensor in tensors.items():
            reader.fill(name, tensor)
        return reader.manifest


def difference(
    own: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]
) -> str | None:
    """In what the shapes `other` of a checkpoint differ from one's `own`, or None."""
    missing, foreign = sorted(own.keys() - other.keys()), sorted(other.keys() - own.keys())
    if missing or foreign:
        parts = [f"it lacks {len(missing)} tensors such as {missing[0]}"] if missing else []
        parts += [f"it has {len(foreign)} others such as {foreign[0]}"] if foreign else []
        return " and ".join(parts)
    for name, shape in own.items():
        if shape != other[name]:
            return f"{name} is {other[name]} there and {shape} here"
    return None
