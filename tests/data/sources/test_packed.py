import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from selfsight.data.sources.packed import PackedNpz


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    files = [b"one", b"", b"three3"]
    np.savez(
        tmp_path / "set.npz",
        train_bytes=np.frombuffer(b"".join(files), np.uint8),
        train_offsets=np.cumsum([0, *map(len, files)]),
        train_labels=np.array([2, 0, 1]),
        extra_bytes=np.frombuffer(b"x", np.uint8),
        extra_offsets=np.array([0, 1]),
    )
    return tmp_path / "set.npz"


def test_records(packed: Path):
    source = PackedNpz(str(packed))
    records = [source.read(i) for i in range(len(source))]
    assert [r.data for r in records] == [b"one", b"", b"three3"]
    assert [r.label for r in records] == [2, 0, 1] and records[1].key == "train/1"
    assert PackedNpz(str(packed), "extra").read(0).label is None


def test_pickling_sends_no_image(packed: Path):
    source = PackedNpz(str(packed))
    first = source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy._bytes is None and copy.read(0) == first


def test_mistakes_are_one_sentence(packed: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.path="):
        PackedNpz(None)
    with pytest.raises(ValueError, match="does not exist"):
        PackedNpz(str(tmp_path / "no.npz"))
    with pytest.raises(ValueError, match="has no split 'val': it has train, extra"):
        PackedNpz(str(packed), "val")
    (tmp_path / "bad.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        PackedNpz(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "code.npz", train_bytes=np.array([{}]), train_offsets=np.array([{}, {}]))
    with pytest.raises(ValueError, match="are not plain integers"):
        PackedNpz(str(tmp_path / "code.npz"))


def test_real_set(sets: Path):
    folder = sets / "cifar10"
    source = PackedNpz(str(folder / "cifar10_jpeg.npz"), "test")
    assert len(source) == 10000
    labels = {source.read(i).label for i in range(200)}
    assert labels <= set(range(len(json.loads((folder / "dataset.json").read_text())["classes"])))
