import io
import pickle
import tarfile
from pathlib import Path

import pytest

from selfsight.data.sources.shards import TarShards, expand_braces


def write(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for s in range(3):
        write(
            tmp_path / f"web-{s:06d}.tar",
            {
                f"{s}{n:03d}.{end}": content
                for n in range(4)
                for end, content in (
                    ("json", b'{"a": 1}'),
                    ("jpg", f"image {s} {n}".encode()),
                    ("cls", f"{n}\n".encode()),
                )
            },
        )
    return tmp_path


def test_members_keys_labels(shards: Path):
    source = TarShards(str(shards / "web-{000000..000002}.tar"))
    assert len(source) == 12
    for i in range(12):
        s, n = divmod(i, 4)
        record = source.read(i)
        assert record.data == f"image {s} {n}".encode() and record.label == n
        assert record.key == source.key(i) == f"web-{s:06d}.tar:{s}{n:03d}.jpg"


def test_all_ways_to_name_shards(shards: Path):
    (shards / "list.txt").write_text("# first two\nweb-{000000,000001}.tar\n\nweb-000002.tar\n")
    expected = [TarShards(str(shards)).key(i) for i in range(12)]
    for form in (
        str(shards / "web-*.tar"),
        [str(shards / f"web-00000{s}.tar") for s in range(3)],
        str(shards / "list.txt"),
    ):
        source = TarShards(form)
        assert [source.key(i) for i in range(len(source))] == expected


def test_braces():
    assert expand_braces("a-{008..011}.tar") == [f"a-{n:03d}.tar" for n in range(8, 12)]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("plain{}.tar") == ["plain{}.tar"]


def test_shards_of_one_name_in_two_folders_have_different_keys(tmp_path: Path):
    for folder in ("x", "y"):
        write(tmp_path / folder / "0.tar", {"1.jpg": folder.encode()})
    source = TarShards(str(tmp_path / "{x,y}" / "0.tar"))
    assert [source.key(0), source.key(1)] == ["x/0.tar:1.jpg", "y/0.tar:1.jpg"]


def test_members_of_any_kind_are_harmless(tmp_path: Path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../escape.jpg", "/etc/passwd.jpg", "a" * 200 + ".jpg", "é/b.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("x.pyd", "x.pkl", ".hidden.jpg", "folder/"):
            tar.addfile(tarfile.TarInfo(name))
    source = TarShards(str(path))
    assert len(source) == 4 and all(source.read(i).data == b"abc" for i in range(4))
    assert list(tmp_path.iterdir()) == [path]


def test_a_shard_that_was_cut_keeps_its_whole_members(shards: Path):
    whole = shards / "web-000001.tar"
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        third = tar.getmember("1002.jpg")
    whole.write_bytes(data[: third.offset_data + 3])  # in the middle of an image
    source = TarShards(str(whole))
    assert [source.read(i).data for i in range(2)] == [b"image 1 0", b"image 1 1"]
    if len(source) > 2:
        with pytest.raises(OSError, match="ends within this member"):
            source.read(2)


def test_a_source_can_be_pickled_after_reading(shards: Path):
    source = TarShards(str(shards))
    first = source.read(5)
    assert pickle.loads(pickle.dumps(source)).read(5) == first


def test_more_shards_than_files_may_be_open(shards: Path, monkeypatch):
    monkeypatch.setattr("selfsight.data.sources.shards.OPEN_FILES", 2)
    source = TarShards(str(shards))
    assert source.read(11).data == b"image 2 3" and not source._files


def test_mistakes_are_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.shards="):
        TarShards(None)
    with pytest.raises(ValueError, match=r"no shard is found at .*none-000000\.tar"):
        TarShards(str(tmp_path / "none-{000000..000003}.tar"))
    with pytest.raises(ValueError, match="would run a command"):
        TarShards("pipe:curl http://example.org/a.tar")
    with pytest.raises(ValueError, match="is a remote address"):
        TarShards(["https://example.org/a.tar"])
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar file"):
        TarShards(str(tmp_path / "a.tar"))
    write(tmp_path / "b.tar", {"a.json": b"{}"})
    with pytest.raises(ValueError, match="hold no image"):
        TarShards(str(tmp_path / "b.tar"))
    (tmp_path / "c.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="is empty"):
        TarShards(str(tmp_path / "c.txt"))


def test_real_shards(sets: Path):
    train = TarShards(str(sets / "caltech101" / "train-{000000..000002}.tar"))
    assert len(train) == 2987
    labels = [train.read(i).label for i in range(len(train))]
    assert set(labels) == set(range(100))
    origins = (sets / "caltech101" / "origins.tsv").read_text().splitlines()
    member = train.key(1000).split(":")[1].split(".")[0]
    assert any(member in line and f"\t{labels[1000]}\t" in line for line in origins)
    assert len(TarShards(str(sets / "uncurated"))) == 335
