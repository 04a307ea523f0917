"""URL lists: text, csv, tsv and parquet, read row by row in bounded memory."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, Any

from selfsight.fetch.errors import require

URL_COLUMNS = ("url", "URL", "image_url", "Url", "image_link", "img_url", "photo_image_url")
TEXT = (".txt", ".list", ".urls")
TABLES = {".csv": ",", ".tsv": "\t"}
KNOWN = (*TEXT, *TABLES, ".parquet")
MAX_LINE = 1 << 20  # characters; the rest of a longer line is passed over

csv.field_size_limit(MAX_LINE)
_CREDENTIALS = re.compile(r"^(\w+:)?//[^/?#]*@")


@dataclass(slots=True)
class Row:
    """One entry: its number over all lists (the key of its image), URL, and kept columns."""

    number: int
    url: str
    columns: dict[str, Any]


class UrlLists:
    """The rows of one or several list files, always in the same order.

    `urls` is a file, a glob, a folder (its list files), or a list of these. Text files have one URL
    a line; empty lines and those that begin with # do not count. Tables have a column of URLs,
    `column` or else the first of `URL_COLUMNS` that is there; the columns `keep` are kept. Text and
    tables may be packed by gzip (`.gz`).

    Raises:
        ValueError: nothing given, nothing found, a kind of file or a column that is not known.
    """

    def __init__(
        self,
        urls: str | Sequence[str] | None,
        column: str | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        if not urls:
            raise ValueError("a list of URLs is needed: set urls=/path/to/list.parquet.")
        self._column, self._keep = column, tuple(keep)
        asked = [urls] if isinstance(urls, str) else list(urls)
        self.files = [path for item in asked for path in _expand(item)]
        for path in self.files:
            kind = _kind(path)
            if kind == ".parquet":
                self._parquet_columns(path)
            elif kind in TABLES:
                with _open(path) as file:
                    self._table_columns(
                        path, next(csv.reader(_lines(file), delimiter=TABLES[kind]), [])
                    )
            elif self._keep:
                raise ValueError(f"{path} has no columns to keep: set keep_columns=[].")

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and first and last bytes."""
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                digest.update(file.read(1 << 16))
        return digest.hexdigest()

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from number `start` on."""
        number = 0
        for path in self.files:
            kind = _kind(path)
            left = max(0, start - number)
            if kind == ".parquet":
                passed, entries = self._parquet(path, left)
            else:
                entries = self._table(path, TABLES[kind]) if kind in TABLES else _text(path)
                passed = sum(1 for _ in islice(entries, left))
            number += passed
            for url, columns in entries:
                yield Row(number, _CREDENTIALS.sub(r"\1//", url.strip()), columns)
                number += 1

    def _table(self, path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with _open(path) as file:
            reader = csv.reader(_lines(file, '""\n'), delimiter=delimiter)
            header = next(reader)
            place, kept = self._table_columns(path, header)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error:  # a row that cannot be read must not end the list
                    yield "", {}
                    continue
                if cells:
                    cell = dict(enumerate(cells))
                    yield cell.get(place, ""), {name: cell.get(p) for name, p in kept.items()}

    def _table_columns(self, path: Path, header: list[str]) -> tuple[int, dict[str, int]]:
        names = [name.strip().removeprefix("\ufeff") for name in header]
        url, kept = self._choose(path, names)
        return names.index(url), {name: names.index(name) for name in kept}

    def _parquet(self, path: Path, skip: int) -> tuple[int, Iterator[tuple[str, dict[str, Any]]]]:
        """Rows passed over, and the rest; whole row groups are passed over without reading them."""
        parquet = _pyarrow()
        url, kept = self._parquet_columns(path)
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        skip = passed = min(skip, sum(sizes))
        first = 0
        while first < len(sizes) and sizes[first] <= skip:
            skip -= sizes[first]
            first += 1

        def entries() -> Iterator[tuple[str, dict[str, Any]]]:
            with parquet.ParquetFile(path) as file:
                groups = list(range(first, len(sizes)))
                batches = file.iter_batches(1024, row_groups=groups, columns=[url, *kept])
                for batch in batches if groups else ():
                    columns = {name: batch.column(name).to_pylist() for name in {url, *kept}}
                    for n in range(batch.num_rows):
                        text = columns[url][n]
                        text = text if isinstance(text, str) else ""
                        yield text, {name: _plain(columns[name][n]) for name in kept}

        return passed, islice(entries(), skip, None)

    def _parquet_columns(self, path: Path) -> tuple[str, tuple[str, ...]]:
        parquet = _pyarrow()
        try:
            names = parquet.read_schema(path).names
        except Exception as error:  # pyarrow has errors of its own for damaged files
            reason = " ".join(str(error).split())[:120].rstrip(".")
            raise ValueError(f"{path} is not a parquet file that can be read: {reason}.") from None
        return self._choose(path, names)

    def _choose(self, path: Path, names: list[str]) -> tuple[str, tuple[str, ...]]:
        """The URL column of a file with these columns, and the kept ones."""
        wanted = [self._column] if self._column else [n for n in URL_COLUMNS if n in names][:1]
        if not wanted:
            raise ValueError(
                f"{path} has no column named {', '.join(URL_COLUMNS[:3])}: name the column of URLs "
                f"with url_column=; it has {', '.join(names) or 'no columns'}."
            )
        for name in (*wanted, *self._keep):
            if name not in names:
                lower = {known.lower(): known for known in names}
                near = get_close_matches(name.lower(), lower, n=1)
                hint = (
                    f"did you mean {lower[near[0]]!r}?" if near else f"it has {', '.join(names)}."
                )
                raise ValueError(f"{path} has no column {name!r}: {hint}")
        return wanted[0], self._keep


def _expand(item: str) -> list[Path]:
    if "://" in item:
        raise ValueError(f"{item} is an address: urls= takes files with lists of URLs in them.")
    path = Path(item).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and _kind(p) in KNOWN)
        if not found:
            raise ValueError(f"the folder {path} holds no list of URLs ({', '.join(KNOWN)}).")
        return found
    # glob.glob, since Path.glob takes no absolute pattern
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        raise ValueError(f"there is no list of URLs at {path}.")
    for match in found:
        if _kind(match) not in KNOWN:
            raise ValueError(f"{match} is no known kind of list: it is one of {', '.join(KNOWN)}.")
    return found


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="")
    return path.open(encoding="utf-8", errors="replace", newline="")


def _lines(file: IO[str], instead: str | None = None) -> Iterator[str]:
    """Lines of bounded length: of a longer one its beginning, or `instead`."""
    while line := file.readline(MAX_LINE):
        whole = len(line) < MAX_LINE or line.endswith("\n")
        yield line if whole or instead is None else instead
        while not whole and (line := file.readline(MAX_LINE)):
            whole = line.endswith("\n")


def _text(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for line in _lines(file):
            url = line.strip().removeprefix("\ufeff")
            if url and not url.startswith("#"):
                yield url, {}


def _plain(value: Any) -> Any:
    """What JSON can hold: other values as text, not-a-number as nothing."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _pyarrow() -> Any:
    require("pyarrow")
    import pyarrow.parquet

    return pyarrow.parquet


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`, cut where a multiple of it is reached."""
    batch: list[Row] = []
    for row in rows:
        if batch and row.number // size != batch[0].number // size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
