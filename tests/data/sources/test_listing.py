import os
import time
from pathlib import Path

import pytest

from selfsight.data.sources.listing import Listing, expand, expand_braces, full, short, title
from selfsight.data.sources.storage import Storage
from tests.data.stores import serving
from tests.data.tars import shard, write


def listed(*asked: str) -> Listing:
    return expand(asked, Storage(2.0))


def names(listing: Listing) -> list[str]:
    return [listing.name(address) for address in listing.addresses]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar", "b/note.md"):
        write(tmp_path / name, shard(0, 1))
    return tmp_path


def test_braces():
    assert expand_braces("a-{008..011}.tar") == [f"a-{n:03d}.tar" for n in range(8, 12)]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("plain{}.tar") == ["plain{}.tar"]
    assert expand_braces("{a,}x") == ["ax", "x"]
    with pytest.raises(ValueError, match="more than 10000000 shards"):
        expand_braces("{0..9999}/{0..9999}.tar")


def test_local_forms_and_short_names(tars: Path, monkeypatch):
    assert names(listed(str(tars / "a"))) == ["0.tar", "1.tar"]
    assert names(listed(f"{tars}/a/")) == ["0.tar", "1.tar"]
    assert names(listed(str(tars / "{a,b}" / "0.tar"))) == ["a/0.tar", "b/0.tar"]
    assert names(listed(str(tars / "{b,a}"))) == ["b/0.tar", "a/0.tar", "a/1.tar"]
    assert names(listed(str(tars / "*" / "0.tar"))) == ["a/0.tar", "b/0.tar"]
    assert names(listed(str(tars / "**" / "*.tar"))) == [
        "a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar",
    ]  # fmt: skip
    assert names(listed(str(tars / "a/1.tar"))) == ["1.tar"]
    assert names(listed(f"{tars}/a/1.tar", f"{tars}/b/*.tar")) == ["a/1.tar", "b/0.tar"]
    assert names(listed(f"file://{tars}/a/1.tar", f"{tars}/a/1.tar")) == ["1.tar"]  # once
    monkeypatch.chdir(tars)
    assert listed("a/0.tar", "./b/../a/1.tar").addresses == [f"{tars}/a/{n}.tar" for n in (0, 1)]


def test_names_do_not_depend_on_the_place_nor_on_growth(tars: Path):
    before = names(listed(f"{tars}/*/*.tar"))
    write(tars / "c" / "9.tar", shard(9, 1))
    after = names(listed(f"{tars}/*/*.tar"))
    assert set(before) < set(after) and after[-1] == "c/9.tar"
    moved = tars.parent / f"{tars.name}_elsewhere"
    os.rename(tars, moved)  # noqa: PTH104
    assert names(listed(f"{moved}/*/*.tar")) == after


def test_list_files(tars: Path):
    (tars / "inner.list").write_text("b/{0,7}.tar\n")
    (tars / "list.txt").write_text(f"# two\n\na/*.tar\n  inner.list  \n{tars}/b/deep/2.tar\n")
    listing = listed(str(tars / "list.txt"))
    assert names(listing) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/7.tar", "b/deep/2.tar"]
    (tars / "remote.txt").write_text(
        "https://user:secret@host.org/x/{0..1}.tar?key=abc\nhttps://host.org/x/y/2.tar\n"
    )
    listing = listed(str(tars / "remote.txt"))
    assert listing.root == "https://host.org/x/"
    assert names(listing) == ["0.tar", "1.tar", "y/2.tar"]
    assert listing.addresses[0] == "https://user:secret@host.org/x/0.tar?key=abc"
    (tars / "self.txt").write_text("self.txt\n")
    with pytest.raises(ValueError, match="is in itself"):
        listed(str(tars / "self.txt"))


def test_names_of_mixed_places():
    listing = listed("https://a.org/x/0.tar", "s3://bucket/x/0.tar")
    assert names(listing) == listing.addresses and listing.root == ""
    assert [full(n, "") for n in names(listing)] == listing.addresses
    listing = listed("s3://one/0.tar", "s3://two/0.tar")
    assert names(listing) == ["one/0.tar", "two/0.tar"]
    assert short("/elsewhere/0.tar", "/data/") == full("/elsewhere/0.tar", "/data/")


def test_titles(tars: Path):
    assert title(str(tars / "a")) == "a" and title(str(tars / "a" / "{0..1}.tar")) == "a"
    assert title("s3://bucket/set/*.tar") == "set" and title("/x/web.list") == "web"
    assert title("https://u:p@host.org/set/0.tar?token=1") == "set"


def test_remote_lists_and_folders(tars: Path):
    (tars / "list.txt").write_text("a/{0..1}.tar\n/b/0.tar\n")
    with serving(tars) as server:
        listing = listed(f"{server.url}/list.txt")
        assert listing.addresses[:2] == [f"{server.url}/a/{n}.tar" for n in (0, 1)]
        assert listing.addresses[2:] == ["/b/0.tar"]
        assert [path for path, _ in server.log] == ["/list.txt"]  # no shard was asked for
        with pytest.raises(ValueError, match=r"no shard is found at .*/none\.txt"):
            listed(f"{server.url}/none.txt")


def test_mistakes_are_one_sentence(tars: Path):
    for command in ("pipe:curl http://x/a.tar", "simplecache::pipe:cat a.tar"):
        with pytest.raises(ValueError, match="would run a command"):
            listed(command)
    (tars / "p.txt").write_text("a/0.tar\npipe:touch /tmp/x\n")
    with pytest.raises(ValueError, match="would run a command"):
        listed(str(tars / "p.txt"))
    with pytest.raises(ValueError, match=r"no shard is found at .*none-0\.tar: check"):
        listed(str(tars / "none-{0..3}.tar"))
    assert len(listed(str(tars / "a" / "{1..3}.tar")).addresses) == 3  # some vanished
    for nothing in ("b/deep/*.jpg", "b/none", "none.txt"):
        with pytest.raises(ValueError, match="no shard is found at"):
            listed(str(tars / nothing))
    (tars / "c.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="is empty"):
        listed(str(tars / "c.txt"))


def test_a_hundred_thousand(tmp_path: Path):
    """Of a long list, no shard is looked at; a generous bound, since the machine may be busy."""
    lines = "".join(f"s3://bucket/set/{n // 1000:03d}/{n:06d}.tar\n" for n in range(100_000))
    (tmp_path / "list.txt").write_text(lines)
    begin = time.process_time()
    listing = listed(str(tmp_path / "list.txt"))
    braces = listed("s3://bucket/set/x{000000..099999}.tar")
    assert time.process_time() - begin < 6
    assert len(listing.addresses) == len(braces.addresses) == 100_000
    assert listing.root == "s3://bucket/set/" and names(listing)[-1] == "099/099999.tar"
