"""URL lists: every kind gives the same rows, from any start, whatever is wrong inside."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from selfsight.fetch.lists import MAX_LINE, Row, UrlLists, batches

URLS = [f"http://host{n % 7}.org/{n}.jpg?a=1,2&b=ü" for n in range(500)]
CAPTIONS = [f'caption "{n}",\nsecond line' for n in range(500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import csv

    root = tmp_path_factory.mktemp("lists")
    (root / "a.txt").write_text("# a comment\n\n" + "\n".join(URLS) + "\n")
    with gzip.open(root / "a.txt.gz", "wt") as file:
        file.write("\r\n".join(URLS))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["caption", "URL"])
            writer.writerows(zip(CAPTIONS, URLS, strict=True))
    table = pyarrow.table(
        {"image_url": URLS, "caption": CAPTIONS, "similarity": [float("nan")] + [0.25] * 499}
    )
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=130)
    return root


NAMES = ["a.txt", "a.txt.gz", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_gives_all_rows_from_any_start(folder, name):
    lists = UrlLists(str(folder / name))
    rows = list(lists.rows())
    assert [row.url for row in rows] == URLS
    assert [row.number for row in rows] == list(range(500))
    for start in (1, 129, 130, 131, 260, 499, 500, 700):
        assert list(lists.rows(start)) == rows[start:]


def test_several_files_count_on(folder):
    names = [str(folder / name) for name in NAMES]
    lists = UrlLists(names)
    rows = list(lists.rows())
    assert [row.url for row in rows] == URLS * 5
    for start in (499, 500, 1100, 1999, 2130):
        assert list(lists.rows(start)) == rows[start:]
    assert [row.url for row in UrlLists(str(folder)).rows()] == URLS * 5
    assert [row.url for row in UrlLists(str(folder / "a.*sv")).rows()] == URLS * 2
    assert [len(batch) for batch in batches(lists.rows(700), 700)] == [700, 700, 400]


def test_columns_are_chosen_and_kept(folder):
    row = next(UrlLists(str(folder / "a.csv"), keep=["caption"]).rows(3))
    assert row == Row(3, URLS[3], {"caption": CAPTIONS[3]})
    lists = UrlLists(str(folder / "a.parquet"), "image_url", ["caption", "similarity"])
    rows = list(lists.rows())
    assert rows[0].columns == {"caption": CAPTIONS[0], "similarity": None}  # JSON has no NaN
    assert rows[1].columns["similarity"] == 0.25
    json.dumps(rows[0].columns, allow_nan=False)
    assert next(UrlLists(str(folder / "a.parquet"), "caption").rows()).url == CAPTIONS[0].strip()


def test_what_is_wrong_inside_costs_no_other_row(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_bytes(
        b"url,hash\n"
        b"http://a.org/1,1\n"
        b"\n"
        b"\xff\xfe\x80,2\n"
        b'"' + b"x" * (MAX_LINE + 10) + b'",3\n'
        b"http://a.org/2\n"
        b",4\n"
        b"http://user:sec@ret@a.org/3,5\n"
    )
    rows = list(UrlLists(str(bad), keep=["hash"]).rows())
    urls = [row.url for row in rows]
    assert urls[0] == "http://a.org/1" and urls[-1] == "http://a.org/3"
    assert "http://a.org/2" in urls and "" in urls
    assert rows[urls.index("http://a.org/2")].columns == {"hash": None}
    table = pyarrow.table({"url": ["http://a.org/1", None, "http://a.org/2"]})
    pyarrow.parquet.write_table(table, tmp_path / "holes.parquet")
    found = [row.url for row in UrlLists(str(tmp_path / "holes.parquet")).rows()]
    assert found == ["http://a.org/1", "", "http://a.org/2"]
    (tmp_path / "long.txt").write_text("h" * (3 * MAX_LINE) + "\nhttp://a.org/1\n")
    found = [row.url for row in UrlLists(str(tmp_path / "long.txt")).rows()]
    assert len(found) == 2 and len(found[0]) == MAX_LINE and found[1] == "http://a.org/1"


def test_a_long_list_is_not_held_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "long.txt"
    path.write_text(
        "".join(f"http://host.org/a/long/path/to/some/image/{n}.jpg\n" for n in range(200_000))
    )
    assert path.stat().st_size > 9_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in UrlLists(str(path)).rows()) == 200_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_fingerprint_notices_change(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("http://a.org/1\n")
    first = UrlLists(str(path)).fingerprint()
    assert UrlLists(str(path)).fingerprint() == first
    path.write_text("http://a.org/2\n")
    assert UrlLists(str(path)).fingerprint() != first


def test_mistakes_are_sentences(folder, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "torn.parquet").write_bytes((folder / "a.parquet").read_bytes()[:500])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "none").mkdir()
    cases = [
        ((None,), "urls="),
        (([],), "urls="),
        ((str(tmp_path / "no.txt"),), "no list of URLs at"),
        ((str(tmp_path / "a.json"),), "no known kind of list"),
        ((str(tmp_path / "none"),), "holds no list"),
        (("https://a.org/list.txt",), "is an address"),
        ((str(tmp_path / "torn.parquet"),), "not a parquet file"),
        ((str(tmp_path / "empty.csv"),), "no column named url"),
        ((str(folder / "a.csv"), "Url"), "did you mean 'URL'"),
        ((str(folder / "a.csv"), None, ["captions"]), "did you mean 'caption'"),
        ((str(folder / "a.txt"), None, ["caption"]), "no columns to keep"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            UrlLists(*arguments)
        assert "\n" not in str(error.value)
