"""torchvision's classification sets, by name."""

from __future__ import annotations

import gzip
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from selfsight.data.sources.source import Record, Source

# Sets in the format of MNIST (LeCun et al. 1998): torchvision wants them unpacked beside the
# packed files, which a read-only data folder does not allow, so they are read here.
_IDX_SETS = ("MNIST", "FashionMNIST", "KMNIST")
_LABELS = ("targets", "_labels", "labels")  # what torchvision's sets call them
_IDX_FILES = {"train": "train", "test": "t10k"}


class TorchvisionSet(Source):
    """The split `split` of `torchvision.datasets.<name>`, for example FashionMNIST or CIFAR10.

    Args:
        name: class name in `torchvision.datasets`, of a set of (image, integer label).
        root: folder that holds the set in torchvision's layout.
        split: "train" or "test", or a split of that set's own.
        download: let torchvision fetch what is missing.

    Raises:
        ValueError: unknown set or split, or the files are not there.
    """

    def __init__(
        self, name: str, root: str | None, split: str = "train", download: bool = False
    ) -> None:
        if root is None:
            raise ValueError(f"a folder that holds {name} is needed: set data.root=/path/to/it.")
        self.name = f"{name}/{split}"
        self.split = split
        self._set: Any = None
        factory: Any = getattr(torchvision.datasets, name, None)
        if not callable(factory):
            raise ValueError(f"torchvision.datasets has no set named {name!r}.")
        folder = Path(root).expanduser()
        if name in _IDX_SETS and split in _IDX_FILES and not download:
            raw = folder / name / "raw"
            images = _read_idx(raw / f"{_IDX_FILES[split]}-images-idx3-ubyte", 16)
            labels = _read_idx(raw / f"{_IDX_FILES[split]}-labels-idx1-ubyte", 8)
            if images is not None and labels is not None:
                self._images = images.reshape(-1, 28, 28)
                self._labels = labels
                self.classes = list(getattr(factory, "classes", map(str, range(10))))
                return
        parameters = inspect.signature(factory).parameters
        if "train" in parameters:
            if split not in ("train", "test"):
                raise ValueError(f"{name} has the splits train and test, not {split!r}.")
            options: dict = {"train": split == "train"}
        else:
            options = {"split": split} if "split" in parameters else {}
        if "download" in parameters:
            options["download"] = download
        try:
            self._set = factory(str(folder), **options)
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            remedy = (
                "download failed, so put the files there"
                if download
                else ("put its files there, or set data.download=true")
            )
            raise ValueError(
                f"{name} ({split}) cannot be read from {root}: {reason}; {remedy}."
            ) from None
        classes = getattr(self._set, "classes", None)
        self.classes = [str(c) for c in classes] if classes is not None else None

    def __len__(self) -> int:
        return len(self._images) if self._set is None else len(self._set)

    def key(self, index: int) -> str:
        return f"{self.split}/{index}"

    def labels(self) -> np.ndarray | None:
        if self._set is None:
            return self._labels.astype(np.int64)
        known = next((getattr(self._set, n) for n in _LABELS if hasattr(self._set, n)), None)
        return None if known is None else np.asarray(known, np.int64)

    def read(self, index: int) -> Record:
        if self._set is None:
            pixels = np.repeat(self._images[index][:, :, None], 3, axis=2)
            label = int(self._labels[index])
        else:
            image, label = self._set[index]
            assert isinstance(image, Image.Image)
            pixels, label = np.array(image.convert("RGB")), int(label)
        return Record(self.key(index), pixels, label)


def _read_idx(path: Path, header: int) -> np.ndarray | None:
    """The uint8 values of an idx file, packed (.gz) or not; None where there is neither."""
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        data = path.read_bytes()
    elif packed.is_file():
        data = gzip.decompress(packed.read_bytes())
    else:
        return None
    return np.frombuffer(data, np.uint8, offset=header)
