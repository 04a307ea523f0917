"""A folder of image files, of any depth."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from selfsight.data.sources.source import IMAGE_EXTENSIONS, Record, Source, StringTable


class ImageFolder(Source):
    """All image files below `path`, in the order of their relative paths.

    Files are chosen by extension; hidden files and folders (a leading dot) are left out; links to
    folders are followed. With `labels="folders"` the class of an image is the first folder below
    `path`, numbered in sorted order, where there are at least two such folders; files directly in
    `path` have no label. The key of a sample is its path relative to `path`.

    Raises:
        ValueError: no path given, no such folder, or no image in it.
    """

    def __init__(self, path: str | None, labels: Literal["folders"] | None = None) -> None:
        if path is None:
            raise ValueError("a folder of images is needed: set data.path=/path/to/images.")
        if labels not in ("folders", None):
            raise ValueError(f'labels={labels!r} is unknown: use "folders" or null.')
        self.root = Path(path).expanduser()
        if not self.root.exists():
            raise ValueError(f"the image folder {path} does not exist.")
        if not self.root.is_dir():
            raise ValueError(f"{path} is not a folder: give the folder that holds the images.")
        found: list[str] = []
        files = _scan(self.root, "", found, ())
        if not found:
            raise ValueError(
                f"the image folder {path} is empty."
                if not files
                else f"the folder {path} holds no images ({files} other files): looked for "
                f"{', '.join(sorted(IMAGE_EXTENSIONS))}."
            )
        self.name = self.root.resolve().name
        self._paths = StringTable(found)
        self.classes, self._labels = None, None
        if labels == "folders":
            first = [p.split("/", 1)[0] if "/" in p else "" for p in found]
            names = sorted(set(first) - {""})
            if len(names) > 1:
                number = {name: i for i, name in enumerate(names)} | {"": -1}
                self.classes = names
                self._labels = np.array([number[name] for name in first], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> Record:
        key = self._paths[index]
        label = None if self._labels is None or self._labels[index] < 0 else self._labels[index]
        return Record(key, (self.root / key).read_bytes(), None if label is None else int(label))


def _scan(root: Path, prefix: str, found: list[str], above: tuple[tuple[int, int], ...]) -> int:
    """Collect the images below root/prefix in sorted order; return the number of all files."""
    folder = root / prefix
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link back to a folder above: the same files again, without end
        return 0
    files = 0
    with os.scandir(folder) as entries:
        # Sorted by bytes, so that the order depends neither on the file system nor on the locale.
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            files += _scan(root, f"{prefix}{entry.name}/", found, (*above, identity))
        elif entry.is_file():
            files += 1
            if entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                found.append(prefix + entry.name)
    return files
