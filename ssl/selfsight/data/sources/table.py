"""Images listed in a table: csv, tsv or parquet, with a column of paths and one of labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from selfsight.data.sources.source import Record, Source

_PATHS = ("path", "file", "filename", "image", "image_path", "ImageID")
_LABELS = ("label", "class", "labels", "category", "LabelName")
_FALSE = ("", "0", "0.0", "false")


class TableImages(Source):
    """One image a row, or, where several labels belong to an image, also one row a label.

    Labels may be numbers from 0 or names; names are numbered in sorted order, or as `classes` has
    them. The key of a sample is its path as the table has it.

    Args:
        table: .csv, .tsv or .parquet.
        root: folder that paths are relative to; None: that of the table.
        path_column, label_column: None: the first of the usual names that is there.
        separator: between several labels in one cell; with it (or with a path in several rows)
            images have sets of labels.
        classes: names in the order of their numbers; None: all that the table has, sorted. Give the
            same for train and test, or a file with one name a line.
        judged_column: of a table with one row a label (OpenImages' Confidence): where it is 0 the
            image was judged not to show the class, and classes without a row are not judged.
        suffix: added to each path, such as .jpg.

    Raises:
        ValueError: no such table, column or class; one sentence.
    """

    def __init__(
        self,
        table: str | None,
        root: str | None = None,
        path_column: str | None = None,
        label_column: str | None = None,
        separator: str | None = None,
        classes: str | list[str] | None = None,
        judged_column: str | None = None,
        suffix: str = "",
    ) -> None:
        if table is None:
            raise ValueError("a table of images is needed: set data.table=/path/to/images.csv.")
        file = Path(table).expanduser()
        self.name = file.stem
        self._root = Path(root).expanduser() if root else file.parent
        columns = _read(file)
        paths = _column(columns, path_column, _PATHS, file, "data.path_column")
        labels = _column(columns, label_column, _LABELS, file, "data.label_column", needed=False)
        if not paths:
            raise ValueError(f"the table {table} has no row.")
        first: dict[str, int] = {}
        for path in paths:
            first.setdefault(f"{path}{suffix}", len(first))
        self._paths = list(first)
        self._sets: list[list[tuple[int, int]]] | None = None
        self._labels = np.full(len(first), -1, np.int64)
        if labels is None:
            return
        several = separator is not None or judged_column is not None or len(first) < len(paths)
        cells = [c.split(separator) if separator else [c] for c in map(str.strip, labels)]
        cells = [[name.strip() for name in names if name.strip()] for names in cells]
        self.classes = _classes(classes, {name for names in cells for name in names}, file)
        numbers = {name: number for number, name in enumerate(self.classes)}
        judged = columns.get(judged_column, None) if judged_column else None
        if judged_column and judged is None:
            raise ValueError(
                f"{table} has no column {judged_column!r}: it has {', '.join(columns)}."
            )
        sets: list[list[tuple[int, int]]] = [[] for _ in first]
        for row, (path, names) in enumerate(zip(paths, cells, strict=True)):
            value = 1 if judged is None or judged[row].strip().lower() not in _FALSE else 0
            for name in names:
                if name not in numbers:
                    raise ValueError(
                        f"row {row + 2} of {table} has the class {name!r}, which data.classes lacks."
                    )
                sets[first[f"{path}{suffix}"]].append((numbers[name], value))
        self._unnamed = 0 if judged_column is None else -1
        if several:
            self._sets = sets
            self.label_sets = self._label_set
        else:
            for index, pairs in enumerate(sets):
                self._labels[index] = pairs[0][0] if pairs else -1

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> Record:
        name = self._paths[index]
        try:
            data = (self._root / name).read_bytes()
        except OSError as error:
            raise OSError(f"{name} cannot be read: {error.strerror}") from None
        label = int(self._labels[index])
        return Record(name, data, None if label < 0 else label)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        return f"{len(self)} images of {self._root}"

    def _label_set(self, index: int) -> np.ndarray:
        assert self._sets is not None and self.classes is not None
        row = np.full(len(self.classes), self._unnamed, np.int8)
        for number, value in self._sets[index]:
            row[number] = value
        return row


def _read(file: Path) -> dict[str, list[str]]:
    """The columns of a table as texts."""
    if not file.is_file():
        raise ValueError(f"the table {file} does not exist.")
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError("parquet tables need pyarrow: run `uv sync --extra fetch`.") from None
        try:
            found = parquet.read_table(file).to_pydict()
        except Exception as error:  # of many kinds
            raise ValueError(f"the table {file} cannot be read: {error}.") from None
        join = "\n".join
        return {
            name: [
                "" if v is None else join(map(str, v)) if isinstance(v, list) else str(v) for v in c
            ]
            for name, c in found.items()
        }
    if file.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{file} is no table: .csv, .tsv and .parquet are read.")
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            head = next(reader, [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the table {file} cannot be read: {error}.") from None
    for number, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise ValueError(f"line {number} of {file} has {len(row)} cells and not {len(head)}.")
    return {name.strip(): [row[i] for row in rows] for i, name in enumerate(head)}


def _column(
    columns: dict[str, list[str]],
    asked: str | None,
    usual: tuple[str, ...],
    file: Path,
    key: str,
    needed: bool = True,
) -> list[str] | None:
    name = asked or next((n for n in usual if n in columns), None)
    if name in columns:
        return columns[name]
    if name is None and not needed:
        return None
    raise ValueError(
        f"{file} has no column {(name or usual[0])!r}: set {key} to one of {', '.join(columns)}."
    )


def _classes(asked: str | list[str] | None, found: set[str], file: Path) -> list[str]:
    if isinstance(asked, str):
        path = Path(asked).expanduser()
        if not path.is_file():
            raise ValueError(f"the list of classes {asked} does not exist.")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if asked:
        return list(asked)
    if found and all(name.isdigit() for name in found):
        most = max(map(int, found))
        if most >= 1_000_000:
            raise ValueError(f"{file} has the label {most}: labels are numbers from 0, or names.")
        return [str(n) for n in range(most + 1)]
    return sorted(found)
