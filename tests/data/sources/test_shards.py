import json
import os
import pickle
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from selfsight.data.sources import tar_index
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Gone, Record
from tests.data.tars import IMAGES, everything, expected, shard, write


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for s in range(3):
        write(tmp_path / "set" / f"web-{s:06d}.tar", shard(s, IMAGES))
    return tmp_path / "set"


# ------------------------------------------------------------------------------- local shards


def test_members_keys_labels(shards: Path):
    source = TarShards(str(shards / "web-{000000..000002}.tar"))
    assert source.flat and not source.grows and source.threads == 0
    assert len(source) == source.shards() == 3 * IMAGES and source.name == "set"
    assert [source.read(i) for i in range(len(source))] == expected()
    assert [source.key(i) for i in range(len(source))] == [r.key for r in expected()]
    assert everything(source) == expected()


def test_runs_hold_the_same(shards: Path):
    source = TarShards(str(shards), whole_index=False, pieces=7)
    assert not source.flat and source.grows and source.shards() == 3
    assert everything(source) == expected()
    assert [source.length(0, q) for q in range(7)] == [2, 3, 3, 3, 3, 3, 3]
    assert source.fetch_key(1, 2, 0) == "web-000001.tar:1005.jpg"
    assert source.fetch_key(1, 2, -1) == "web-000001.tar"
    fresh = TarShards(str(shards), whole_index=False)
    assert fresh.fetch_key(1, 2, 0) == "web-000001.tar"  # all that is known before it is opened
    assert sum(fresh.length(0, q) for q in range(16)) == IMAGES
    assert [fresh.length(0, q) for q in range(16)].count(1) == 12  # some pieces may be empty


def test_the_length_is_known_once_all_indexes_are(shards: Path, tmp_path: Path):
    def make() -> TarShards:
        return TarShards(str(shards), whole_index=False, index=str(tmp_path / "index"))

    source = make()
    with pytest.raises(ValueError, match="set images= or steps= instead of epochs="):
        len(source)
    everything(source)
    assert len(source) == 60 and source.read(41) == expected()[41]
    assert len(make()) == 60  # from the saved indexes
    write(shards / "web-000001.tar", shard(1, 5))
    with pytest.raises(ValueError, match="is not known"):
        len(make())


def test_saved_indexes_are_used_checked_and_renewed(shards: Path, tmp_path: Path, monkeypatch):
    scans = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda read: scans.append(1) or scan(read))
    folder = tmp_path / "index"
    for count in (3, 3):
        assert everything(TarShards(str(shards), index=str(folder))) == expected()
        assert len(scans) == count
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
    assert everything(TarShards(str(shards), index=str(folder))) == expected()
    assert len(scans) == 4
    tar_index.write_index(shards / "web-000000.tar")
    scans.clear()
    assert everything(TarShards(str(shards / "web-000000.tar"))) == expected(1)
    assert not scans


def test_shards_of_one_name_in_two_folders_have_different_keys(tmp_path: Path):
    for folder in ("x", "y"):
        write(tmp_path / folder / "0.tar", {"1.jpg": folder.encode()})
    source = TarShards(str(tmp_path / "{x,y}" / "0.tar"))
    assert [source.key(0), source.key(1)] == ["x/0.tar:1.jpg", "y/0.tar:1.jpg"]


def test_members_of_any_kind_are_harmless(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (os._exit, (3,))

    path = tmp_path / "s.tar"
    names = ["../../escape.jpg", "/etc/passwd.jpg", "a" * 200 + ".jpg", "é/b.png"]
    members = dict.fromkeys(names, b"abc")
    members |= dict.fromkeys(["x.pyd", "x.pkl", "x.pickle"], pickle.dumps(Trap()))
    with tarfile.open(write(path, members), "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    for flat in (True, False):
        source = TarShards(str(path), whole_index=flat)
        records = everything(source)
        assert [r.data for r in records] == [b"abc"] * 4
        assert [r.key.split(":", 1)[1] for r in records] == names
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flat", [True, False])
def test_a_shard_that_was_cut_keeps_its_whole_members(shards: Path, flat: bool):
    whole = shards / "web-000001.tar"
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        third = tar.getmember("1002.jpg")
    whole.write_bytes(data[: third.offset_data + 3])  # in the middle of an image
    source = TarShards(str(whole), whole_index=flat, pieces=1)
    assert [source.fetch(*place).label for place in ([(0, 0, 0), (1, 0, 0)] if flat else [
        (0, 0, 0), (0, 0, 1)])] == [0, 1]  # fmt: skip
    with pytest.raises(OSError, match="the shard ends within this member"):
        source.fetch(*((2, 0, 0) if flat else (0, 0, 2)))
    data = bytearray(whole.read_bytes())
    data[third.offset_data - 512 + 124 : third.offset_data - 512 + 136] = b"77777777777\0"
    head = third.offset_data - 512
    data[head + 148 : head + 156] = b" " * 8
    data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
    whole.write_bytes(data)
    source = TarShards(str(whole), whole_index=flat, pieces=1)
    with pytest.raises(OSError, match="more than any image"):  # 8 GB are stated
        source.fetch(*((2, 0, 0) if flat else (0, 0, 2)))


def test_a_vanished_shard_is_gone_and_others_go_on(shards: Path):
    source = TarShards(str(shards), whole_index=False, retry_seconds=0.2)
    (shards / "web-000001.tar").unlink()
    (shards / "web-000002.tar").write_bytes(b"no tar file" * 100)
    for _ in range(2):
        with pytest.raises(Gone, match=r"web-000001\.tar is not there"):
            source.length(1, 0)
    with pytest.raises(OSError, match="not an uncompressed tar file"):
        source.length(2, 0)
    assert source.fetch(0, 0, 0) == expected()[0]
    write(shards / "web-000001.tar", shard(1))
    time.sleep(0.25)  # what failed is asked for again after a while
    assert source.length(1, 15) == 2


def test_a_source_can_be_pickled_after_reading(shards: Path):
    for flat in (True, False):
        source = TarShards(str(shards), whole_index=flat)
        first = source.fetch(0, 0, 0)
        again = pickle.loads(pickle.dumps(source))
        assert again.fetch(0, 0, 0) == first and everything(again) == everything(source)


def test_more_shards_than_files_may_be_open(shards: Path, monkeypatch):
    monkeypatch.setattr("selfsight.data.sources.shards.OPEN_SHARDS", 2)
    monkeypatch.setattr("selfsight.data.sources.shards.FEW", 2)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for flat in (None, True):
        source = TarShards(str(shards), whole_index=flat)
        assert source.flat == bool(flat)
        assert everything(source) == everything(source) == expected()
        assert len(source._shards) == 2
        del source
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_threads_open_a_shard_once(shards: Path, monkeypatch):
    scans = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda read: scans.append(1) or scan(read))
    source = TarShards(str(shards), whole_index=False)
    got: list[Record] = []
    threads = [threading.Thread(target=lambda: got.extend(everything(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 * 60 and len(scans) == 3


def test_a_hint_opens_a_shard_in_the_background(shards: Path):
    source = TarShards(str(shards), whole_index=False)
    source.will_need(1, 0)
    source.will_need(1, 1)
    end = time.monotonic() + 20
    while 1 not in source._shards and time.monotonic() < end:
        time.sleep(0.01)
    assert list(source._shards) == [1]
    threads = [t for t in threading.enumerate() if t.name == "shards"]
    assert threads
    del source
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# --------------------------------------------------------------------------- a list that grows


def test_growth(shards: Path):
    source = TarShards(str(shards / "web-*.tar"), whole_index=False)
    before = everything(source)
    assert source.poll() == []
    for s in (4, 3):
        write(shards / f"web-{s:06d}.tar", shard(s))
    write(shards / "web-000005.tar.part", shard(5))
    names = source.poll()
    assert names == ["web-000003.tar", "web-000004.tar"]
    worker = pickle.loads(pickle.dumps(source))
    for one in (source, worker):
        one.extend(names)
        assert one.shards() == 5 and one.poll() == []
        assert everything(one)[:60] == before
        assert everything(one)[60].key == "web-000003.tar:3000.jpg"
    (shards / "web-000000.tar").unlink()
    assert source.poll() == [] and source.shards() == 5
    resumed = TarShards(str(shards / "web-*.tar"), whole_index=False)
    assert resumed.fingerprint() != source.fingerprint()
    resumed.adopt(json.loads(json.dumps(source.listing())))
    assert resumed.listing() == source.listing() and resumed.fingerprint() == source.fingerprint()
    assert resumed.fetch(4, 0, 0) == source.fetch(4, 0, 0)
    with pytest.raises(Gone):
        resumed.length(0, 0)


def test_a_list_file_that_grows_keeps_its_names(shards: Path):
    write(shards.parent / "other" / "x.tar", shard(9))
    path = shards.parent / "shards.txt"
    path.write_text("set/web-000000.tar\nset/web-000001.tar\n")
    source = TarShards(str(path), grows=True)
    assert not source.flat and source.name == "shards"
    names = source.listing()
    assert names == ["web-000000.tar", "web-000001.tar"]
    with path.open("a") as file:
        file.write("other/x.tar\nset/web-000002.tar\n")
    news = source.poll()
    source.extend(news)
    assert everything(source)[:40] == expected(2)
    resumed = TarShards(str(path), grows=True)  # its root has moved up
    assert resumed.listing()[0] == "set/web-000000.tar" and resumed.name == "shards"
    resumed.adopt(source.listing())
    assert everything(resumed) == everything(source) and resumed.poll() == []
    path.unlink()
    with pytest.warns(RuntimeWarning, match="no new shards are looked for"):
        assert source.poll() == []


def test_single_images_do_not_grow(shards: Path):
    with pytest.raises(ValueError, match="grows=true needs"):
        TarShards(str(shards), whole_index=True, grows=True)
    assert not TarShards(str(shards), whole_index=False, grows=False).grows


# ---------------------------------------------------------------------------------- the rest


def test_start_with_a_hundred_thousand_shards(shards: Path, tmp_path: Path):
    lines = [f"s3://bucket/set/{n // 1000:03d}/{n:06d}.tar" for n in range(100_000)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    tracemalloc.start()
    source = TarShards(str(path))
    assert source.shards() == 100_000 and source.fetch_key(99_999, 0, -1) == "099/099999.tar"
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120e6 and kept < 10e6, (peak, kept)
    begin = time.process_time()
    source = TarShards(str(path))
    assert source.shards() == 100_000
    assert time.process_time() - begin < 6  # under 2 s on a free core
    packed = pickle.dumps(source)
    assert len(packed) < 3_000_000
    assert pickle.loads(packed).fingerprint() == source.fingerprint()


def test_mistakes_are_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set data\.shards="):
        TarShards(None)
    with pytest.raises(ValueError, match=r"no shard is found at .*none-000000\.tar"):
        TarShards(str(tmp_path / "none-{000000..000003}.tar"))
    with pytest.raises(ValueError, match="would run a command"):
        TarShards("pipe:curl http://example.org/a.tar")
    with pytest.raises(ValueError, match="no store of kind nonsense"):
        TarShards(["nonsense://example.org/a.tar"])
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar file"):
        TarShards(str(tmp_path / "a.tar"))
    write(tmp_path / "b.tar", {"a.json": b"{}"})
    with pytest.raises(ValueError, match="hold no image"):
        TarShards(str(tmp_path / "b.tar"))
    (tmp_path / "c.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="is empty"):
        TarShards(str(tmp_path / "c.txt"))
    for pieces, gigabytes, seconds in ((0, 1.0, 1.0), (1, -1.0, 1.0), (1, 1.0, 0.0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            TarShards(
                str(tmp_path / "b.tar"), pieces=pieces, cache_gb=gigabytes, retry_seconds=seconds
            )


def test_an_excerpt_of_shards_that_cannot_be_opened_says_why(tmp_path: Path):
    for n in range(4):
        write(tmp_path / f"{n}.tar", shard(n, 2))
    source = TarShards(str(tmp_path), whole_index=False)
    for n in range(4):
        (tmp_path / f"{n}.tar").unlink()
    with pytest.raises(ValueError, match=r"no shard of 4 can be opened \(.*0\.tar is not there"):
        source.excerpt(8)


def test_real_shards(sets: Path):
    train = TarShards(str(sets / "caltech101" / "train-{000000..000002}.tar"))
    assert len(train) == 2987
    labels = [train.read(i).label for i in range(len(train))]
    assert set(labels) == set(range(100))
    origins = (sets / "caltech101" / "origins.tsv").read_text().splitlines()
    member = train.key(1000).split(":")[1].split(".")[0]
    assert any(member in line and f"\t{labels[1000]}\t" in line for line in origins)
    assert len(TarShards(str(sets / "uncurated"))) == 335
    runs = TarShards(str(sets / "uncurated"), whole_index=False)
    assert len(everything(runs)) == 335
