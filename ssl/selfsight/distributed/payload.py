"""Tensors into a safetensors file, one at a time, hashed in the same pass.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 bytes, little-endian;
the header, JSON that maps each name to dtype, shape and byte offsets; then the bytes, row-major and
without gaps. The library's own `save_file` takes only contiguous tensors, copies those of a GPU all
at once, and leaves the checksum to a second reading. Reading is the library's.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 1 << 24


@dataclass(frozen=True)
class Written:
    """What a file must have when it is read again."""

    size: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a safetensors file and flush it to the disk.

    Tensors may lie anywhere in any layout; no more than one is copied at a time.

    Raises:
        ValueError: a tensor has a dtype that the format or this writer does not know.
        OSError: the file could not be written whole.
    """
    head, order = _layout(tensors, metadata)
    with ThreadPoolExecutor(1, "checksum") as hasher, path.open("wb", buffering=0) as file:
        writer = _HashedWriter(file.fileno(), hasher)
        writer.write(memoryview(head))
        for name in order:
            writer.write_tensor(tensors[name].detach())
        os.fsync(file.fileno())
        return writer.finish()


def reads_back(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bool:
    """Whether the file at `path`, read from the disk anew, holds these tensors byte for byte.

    The pages that the operating system still has of it are let go first, where it can be asked to.

    Args:
        path: a file that `write_tensors` wrote. It may be renamed meanwhile.
        tensors: what it was given.
        metadata: likewise.

    Raises:
        OSError: the file cannot be read.
    """
    head, order = _layout(tensors, metadata)
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(head)) != head:
            return False
        for name in order:
            expected = _bytes_of(tensors[name].detach().cpu().contiguous())
            for start in range(0, expected.numel(), CHUNK):
                part = expected[start : start + CHUNK]
                found = buffer[: part.numel()]
                if not _read_into(file.fileno(), found) or not _same(found, part):
                    return False
        return not file.read(1)


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes by name, and the metadata, of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: its header is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError(f"{path} does not begin as a safetensors file does")
        header = json.loads(file.read(length))
    try:
        metadata = header.pop("__metadata__", {})
        return {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a header that is not a safetensors file's") from error


def _layout(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """The bytes before the data, and the names in the order of the data."""
    assert sys.byteorder == "little", "the format is little-endian"
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES or name == "__metadata__":
            raise ValueError(f"tensor {name} of dtype {tensor.dtype} cannot be stored.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes_of(dense: Tensor) -> Tensor:
    """The bytes of a contiguous tensor in host memory, flat; not copied."""
    return dense.reshape(-1).view(torch.uint8) if dense.numel() else torch.empty(0).byte()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether flat byte tensors of one length are equal; by words, which is six times as fast."""
    left, right = a.numpy(), b.numpy()
    words = len(left) // 8
    return left[8 * words :].tobytes() == right[8 * words :].tobytes() and np.array_equal(
        np.frombuffer(left.data, np.int64, words), np.frombuffer(right.data, np.int64, words)
    )


def _read_into(file: int, buffer: Tensor) -> bool:
    """Fill `buffer` from `file`; False where the file ends before."""
    rest = buffer.numpy().data
    while rest:
        count = os.readv(file, [rest])
        if not count:
            return False
        rest = rest[count:]
    return True


class _HashedWriter:
    """Writes on this thread and hashes on another one; neither holds Python's lock meanwhile."""

    def __init__(self, file: int, hasher: ThreadPoolExecutor):
        self.file = file
        self.hasher = hasher
        self.hash = hashlib.sha256()
        self.size = 0
        self.last: Future | None = None

    def write_tensor(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        dense = tensor.cpu().contiguous()
        self.write(_bytes_of(dense).numpy().data)
        if dense.data_ptr() != tensor.data_ptr() and self.last:
            self.last.result()  # the next copy is made when this one is no longer needed

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self.last = self.hasher.submit(self.hash.update, chunk)
            while chunk:
                chunk = chunk[os.write(self.file, chunk) :]
        self.size += len(data)

    def finish(self) -> Written:
        if self.last:
            self.last.result()
        return Written(self.size, self.hash.hexdigest())


def measure(path: Path) -> Written:
    """Size and checksum of a file as it is on disk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    size = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Written(size, digest.hexdigest())
