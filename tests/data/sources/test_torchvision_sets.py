import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest

from selfsight.data.sources.torchvision_sets import TorchvisionSet


def write_idx(raw: Path, name: str, values: np.ndarray, packed: bool) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    data = header + values.tobytes()
    raw.mkdir(parents=True, exist_ok=True)
    if packed:
        (raw / f"{name}.gz").write_bytes(gzip.compress(data))
    else:
        (raw / name).write_bytes(data)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_packed_or_not(tmp_path: Path, packed: bool):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw, "t10k-images-idx3-ubyte", images, packed)
    write_idx(raw, "t10k-labels-idx1-ubyte", labels, packed)
    source = TorchvisionSet("FashionMNIST", str(tmp_path), "test")
    assert len(source) == 5 and source.classes and source.classes[8] == "Bag"
    for source_ in (source, pickle.loads(pickle.dumps(source))):
        record = source_.read(2)
        assert isinstance(record.data, np.ndarray) and record.data.shape == (28, 28, 3)
        assert (record.data == images[2][:, :, None]).all() and record.label == 4


def test_cifar10_by_torchvision(tmp_path: Path, monkeypatch):
    """A CIFAR-10 in the layout that torchvision reads, whose checksums are its own business."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10)) * 2}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = TorchvisionSet("CIFAR10", str(tmp_path), "train")
    assert len(source) == 100 and source.classes == list("abcdefghij")
    record = source.read(23)
    assert isinstance(record.data, np.ndarray)
    assert np.array_equal(record.data, data[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert record.label == 3 and record.key == "train/23"


def test_mistakes_are_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.root="):
        TorchvisionSet("CIFAR10", None)
    for name in ("CIFAR10", "FashionMNIST", "SVHN"):
        with pytest.raises(
            ValueError, match=rf"{name} \(test\) cannot be read from .*download=true"
        ):
            TorchvisionSet(name, str(tmp_path), "test")
    with pytest.raises(ValueError, match="no set named 'CIFAR11'"):
        TorchvisionSet("CIFAR11", str(tmp_path))
    with pytest.raises(ValueError, match="has the splits train and test, not 'val'"):
        TorchvisionSet("CIFAR10", str(tmp_path), "val")


def test_real_fashion_mnist(sets: Path):
    train = TorchvisionSet("FashionMNIST", str(sets / "fashion_mnist"))
    test = TorchvisionSet("FashionMNIST", str(sets / "fashion_mnist"), "test")
    assert (len(train), len(test)) == (60000, 10000)
    assert (
        train.read(0).label == 9
        and np.bincount([test.read(i).label or 0 for i in range(10000)]).tolist() == [1000] * 10
    )
