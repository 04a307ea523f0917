"""Hugging Face `datasets` with an image column (optional extra `huggingface`)."""

from __future__ import annotations

import glob
import importlib
import os
import stat
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.data.sources.source import Record, Source

_SAMPLED = 16  # rows that the fingerprint looks at


class HuggingFaceImages(Source):
    """One split of a set, its images still encoded. The key of a sample is `split/row`.

    Rows are read from Arrow files mapped into memory, which all processes of a machine share.
    Parquet is first rewritten as such files, in the cache of `datasets`. An image is the bytes in
    its row, or else the local file that the row names.

    Args:
        path: folder of `save_to_disk`; .arrow or .parquet file, or a pattern of such; folder in the
            layout of the hub; or a name on the hub, which is fetched.
        split: name of a split, also with a slice such as "train[:10%]". Of files that have none, it
            is what they are called from here on.
        column: image column; None: the only one.
        label_column: class of the image, a ClassLabel or an integer (negative: none); None: the
            only ClassLabel, if there is one.
        config: configuration of a set that has several.
        revision: branch, tag or commit on the hub.
        cache: folder for what is fetched and rewritten; None: that of HF_HOME.

    Raises:
        ValueError: no path, `datasets` is not installed, the set cannot be opened, or has no such
            split or column.
    """

    def __init__(
        self,
        path: str | None,
        split: str = "train",
        column: str | None = None,
        label_column: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        cache: str | None = None,
    ) -> None:
        if path is None:
            raise ValueError(
                "a Hugging Face set is needed: set data.path to a folder of save_to_disk, to "
                "parquet or arrow files, or to a name on the hub."
            )
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise ValueError(
                "Hugging Face sets need the package datasets: run `uv sync --extra huggingface`."
            ) from None
        self.name, self.split = f"{Path(path).name}/{split}", split
        self._path = path
        options = {"name": config, "revision": revision, "cache_dir": cache}
        rows = _open(datasets, path, split, {k: v for k, v in options.items() if v is not None})
        if not len(rows):
            raise ValueError(f"the split {split!r} of {path} has no rows.")
        self.column = self._image_column(datasets, rows.features, column)
        self.label_column = self._label_column(datasets, rows.features, label_column)
        rows = rows.select_columns([c for c in (self.column, self.label_column) if c is not None])
        if isinstance(rows.features[self.column], datasets.Image):
            rows = rows.cast_column(self.column, datasets.Image(decode=False))
        self._rows = rows
        if isinstance(names := rows.features.get(self.label_column), datasets.ClassLabel):
            self.classes = list(names.names)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return f"{self.split}/{index}"

    def labels(self) -> np.ndarray | None:
        if self.label_column is None:
            return None
        column = self._rows[self.label_column][:]
        return np.array([-1 if x is None else max(x, -1) for x in column], np.int64)

    def read(self, index: int) -> Record:
        row = self._rows[index]
        label = None if self.label_column is None else row[self.label_column]
        return Record(
            self.key(index),
            _encoded(row[self.column]),
            None if label is None or label < 0 else int(label),
        )

    def fingerprint(self) -> str:
        """The number of rows and a hash of what some rows hold, evenly spread."""
        count = len(self)
        digest = blake2b(digest_size=8)
        for n in range(min(_SAMPLED, count)):
            image = self._rows[n * count // min(_SAMPLED, count)][self.column]
            if isinstance(image, dict):
                image = image["bytes"] or os.fsencode(Path(image["path"] or "").name)
            digest.update(blake2b(image or b"").digest())
        return f"{count} rows, {digest.hexdigest()}"

    def _image_column(self, datasets: Any, features: Any, column: str | None) -> str:
        images = [name for name, feature in features.items() if _holds_images(datasets, feature)]
        if column is None:
            if len(images) == 1:
                return images[0]
            what = f"image columns {', '.join(images)}" if images else "no image column"
            raise ValueError(
                f"{self._path} has {what}: name the one to use in data.column; its columns are "
                f"{', '.join(features)}."
            )
        if column not in features:
            raise ValueError(
                f"{self._path} has no column {column!r}: its columns are {', '.join(features)}."
            )
        kind = getattr(features[column], "dtype", None)
        if column not in images and kind not in ("binary", "large_binary"):
            raise ValueError(
                f"the column {column!r} of {self._path} holds no images but "
                f"{kind or features[column]}."
            )
        return column

    def _label_column(self, datasets: Any, features: Any, column: str | None) -> str | None:
        if column is None:
            named = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
            return named[0] if len(named) == 1 else None
        if column not in features:
            raise ValueError(
                f"{self._path} has no column {column!r}: its columns are {', '.join(features)}."
            )
        if "int" not in str(getattr(features[column], "dtype", None)):
            raise ValueError(
                f"the column {column!r} of {self._path} holds no classes: it is neither a "
                "ClassLabel nor an integer."
            )
        return column


def _open(datasets: Any, path: str, split: str, options: dict[str, Any]) -> Any:
    """The rows of a split, as a `datasets.Dataset` mapped into memory."""
    folder = Path(path).expanduser()
    files = [str(folder)] if folder.is_file() else sorted(glob.glob(str(folder)))  # noqa: PTH207
    files = [file for file in files if Path(file).is_file()]
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if split not in splits:
                raise ValueError(f"it has the splits {', '.join(splits)}, not {split!r}")
            return splits[split]
        if (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
            if rows.split is not None and str(rows.split) != split:
                raise ValueError(f"it is the split {str(rows.split)!r}, not {split!r}")
            return rows
        if files:
            kinds = {Path(file).suffix for file in files}
            if kinds == {".arrow"} and split.isidentifier():
                return datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in files])
            if len(kinds) > 1 or not kinds <= {".arrow", ".parquet"}:
                raise ValueError("only .arrow files or only .parquet files are read")
            options = options | {"data_files": {split.partition("[")[0]: files}}
            path = kinds.pop()[1:]
        elif folder.is_dir():
            path = str(folder)
        elif path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise ValueError("there is no such file or folder")
        return datasets.load_dataset(path, split=split, keep_in_memory=False, **options)
    except Exception as error:  # of many kinds, from files and from the network
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = (reason or type(error).__name__).strip().rstrip(".!")[:300]
        raise ValueError(
            f"the Hugging Face set {folder if files else path} cannot be opened: {reason}."
        ) from None


def _holds_images(datasets: Any, feature: Any) -> bool:
    """Whether a column is declared as images, or looks like images that are not declared."""
    if isinstance(feature, dict):
        kinds = {name: getattr(value, "dtype", None) for name, value in feature.items()}
        return kinds.keys() == {"bytes", "path"} and kinds["bytes"] in ("binary", "large_binary")
    return isinstance(feature, datasets.Image)


def _encoded(image: bytes | dict | None) -> bytes:
    """The encoded image of a row: its bytes, or else those of the file that it names."""
    if isinstance(image, bytes):
        return image
    if image is None or (image["bytes"] is None and not image["path"]):
        raise OSError("there is no image in this row")
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"]
    if "://" in path:
        raise OSError("this row names an address: only bytes and local files are read")
    try:
        # A set may come from anyone and name anything: a pipe would be waited for without end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(0, "it is not a file")
            return file.read()
    except OSError as error:
        raise OSError(f"{Path(path).name} cannot be read: {error.strerror}") from None
