"""Our safetensors files against the safetensors library."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selfsight.distributed import payload


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        str(dtype)[6:]: (torch.randn(3, 5) * 10).to(dtype)
        for dtype in payload.DTYPES
        if dtype is not torch.bool
    }
    return (
        tensors
        | {
            "bool": torch.tensor([True, False, True]),  # an odd number of bytes before wider ones
            "scalar": torch.tensor(7),
            "scalar_bool": torch.tensor(True),
            "transposed": torch.randn(4, 6).t(),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "sliced": torch.arange(100)[10:90:7],
            "expanded": torch.ones(1).expand(5),
            "none_of_it": torch.empty(0, 4),
            "parameter": torch.nn.Parameter(torch.randn(2)),
            "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
            "größe/ü": torch.ones(2, dtype=torch.int64),
        }
    )


def test_the_library_reads_what_we_write(tmp_path):
    tensors, path = _tensors(), tmp_path / "a.safetensors"
    payload.write_tensors(path, tensors, {"trunk": "regnety"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits, expected = (t.detach().reshape(-1).contiguous() for t in (found[name], tensor))
        assert torch.equal(bits.view(torch.uint8), expected.view(torch.uint8)), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"trunk": "regnety"}


def test_size_and_checksum_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "CHUNK", 100)  # several chunks a tensor
    path = tmp_path / "a.safetensors"
    written = payload.write_tensors(path, {**_tensors(), "long": torch.randn(1001)})
    data = path.read_bytes()
    assert written == payload.Written(len(data), hashlib.sha256(data).hexdigest())
    assert payload.measure(path) == written
    assert torch.equal(load_file(path)["scalar"], torch.tensor(7))


def test_no_tensors_at_all(tmp_path):
    payload.write_tensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}


def test_an_unknown_dtype_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"tensor phase of dtype torch\.complex64"):
        payload.write_tensors(tmp_path / "a", {"phase": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "a").exists()


def test_a_file_reads_back_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "CHUNK", 100)
    tensors, path = _tensors() | {"long": torch.randn(1001)}, tmp_path / "a.safetensors"
    payload.write_tensors(path, tensors, {"a": "b"})
    assert payload.reads_back(path, tensors, {"a": "b"})
    assert not payload.reads_back(path, tensors, {"a": "c"})
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        assert not payload.reads_back(path, tensors, {"a": "b"}), place
    for other in (data[:-1], data[:50], b"", data + b"x"):
        path.write_bytes(other)
        assert not payload.reads_back(path, tensors, {"a": "b"})


def test_a_header_without_the_data(tmp_path):
    path = tmp_path / "a.safetensors"
    payload.write_tensors(path, _tensors(), {"trunk": "regnety"})
    shapes, metadata = payload.read_header(path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in _tensors().items()}
    assert metadata == {"trunk": "regnety"}
    for text in (b"", b"\0" * 8, b"\xff" * 30, b"\2\0\0\0\0\0\0\0[]", b"\1" + b"\0" * 7 + b"{"):
        path.write_bytes(text)
        with pytest.raises(ValueError):
            payload.read_header(path)
