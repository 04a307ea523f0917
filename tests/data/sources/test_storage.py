"""Reads of real servers on the loopback, with their faults."""

import os
import random
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from selfsight.data.sources import storage as module
from selfsight.data.sources.source import Gone
from selfsight.data.sources.storage import CannotWrite, Storage, check, public
from selfsight.data.sources.web import NoRanges
from tests.data.stores import Server, cut, drip, plain, serving, shorter, status

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "empty.bin").write_bytes(b"")
    with serving(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def download(storage: Storage, address: str, folder: Path, have: int = 0) -> bytes:
    path = folder / "download"
    path.write_bytes(DATA[:have])
    file = os.open(path, os.O_RDWR)
    try:
        storage.download(address, file, have, storage.stat(address))
    finally:
        os.close(file)
    return path.read_bytes()


def test_stat_and_reads(server: Server, tmp_path: Path):
    local, remote = Storage(5.0), Storage(5.0, window=100_000)
    url = f"{server.url}/a.bin"
    stat = remote.stat(url)
    assert (stat.size, stat.version, stat.ranges) == (len(DATA), '"one"', True)
    assert local.stat(str(tmp_path / "a.bin")).size == len(DATA)
    for begin, size in ((0, 1), (5, 0), (1000, 250_000), (len(DATA) - 3, 3)):
        expected = DATA[begin : begin + size]
        assert remote.read(url, begin, size) == expected
        assert local.read(str(tmp_path / "a.bin"), begin, size) == expected
    assert remote.whole(url) == local.whole(str(tmp_path / "a.bin")) == DATA
    assert download(remote, url, tmp_path) == DATA
    assert server.sent["/a.bin"] < 3 * len(DATA)
    assert remote.stat(f"{server.url}/empty.bin").size == 0
    with pytest.raises(OSError, match="ends before byte"):
        local.read(str(tmp_path / "a.bin"), len(DATA) - 3, 4)


def test_what_is_gone_is_not_asked_for_again(server: Server, tmp_path: Path):
    for address in (f"{server.url}/none.bin", str(tmp_path / "none.bin")):
        for ask in (Storage(5.0).stat, Storage(5.0).whole, lambda a: Storage(5.0).read(a, 0, 5)):
            with pytest.raises(Gone, match=r"none\.bin is not there"):
                ask(address)
    assert len(server.log) == 3


def test_server_errors_pass(server: Server):
    server.faults["/a.bin"] = [status(500), status(503), status(429, Retry_After="0")]
    assert Storage(10.0).read(f"{server.url}/a.bin", 7, 1000) == DATA[7:1007]
    assert len(server.log) == 4


def test_a_server_that_asks_for_patience_gets_it(server: Server):
    server.faults["/a.bin"] = [status(503, Retry_After="1")]
    begin = time.monotonic()
    Storage(10.0).read(f"{server.url}/a.bin", 0, 10)
    assert time.monotonic() - begin >= 1
    server.faults["/a.bin"] = [status(503, Retry_After=formatdate(time.time() + 3600, usegmt=True))]
    with pytest.raises(OSError, match="HTTP status 503"):  # more than there is
        Storage(1.0).read(f"{server.url}/a.bin", 0, 10)


def test_errors_that_stay(server: Server):
    server.always = status(500)
    with pytest.raises(OSError, match=r"could not be read within 0\.3 s \(\d+ tries\): HTTP sta"):
        Storage(0.3).read(f"{server.url}/a.bin", 0, 10)
    assert len(server.log) > 2
    server.log.clear()
    server.always = status(403)
    with pytest.raises(OSError, match="cannot be read: HTTP status 403"):
        Storage(5.0).stat(f"{server.url}/a.bin")
    assert len(server.log) == 1
    with pytest.raises(OSError, match="could not be read within"):
        Storage(0.3).stat("http://127.0.0.1:9/closed.bin")


def test_a_cut_connection_goes_on_where_it_was(server: Server, tmp_path: Path):
    # The first request asks for the size.
    server.faults["/a.bin"] = [plain, cut(100_000), cut(50_000), cut(0)]
    assert download(Storage(10.0), f"{server.url}/a.bin", tmp_path) == DATA
    begins = [int(asked[6:].split("-")[0]) for _, asked in server.log[1:]]
    assert begins == [0, 100_000, 150_000, 150_000]
    assert server.sent["/a.bin"] <= len(DATA) + 1
    server.faults["/a.bin"] = [cut(100)]
    assert Storage(10.0).read(f"{server.url}/a.bin", 50, 200) == DATA[50:250]
    assert server.log[-1][1] == "bytes=150-249"


def test_a_part_that_is_here_is_not_fetched_again(server: Server, tmp_path: Path):
    assert download(Storage(10.0), f"{server.url}/a.bin", tmp_path, have=299_000) == DATA
    assert server.sent["/a.bin"] == 1001


def test_a_drip_is_given_up(server: Server, tmp_path: Path):
    server.always = drip()
    storage = Storage(0.5)
    for read in (
        lambda: storage.read(f"{server.url}/a.bin", 0, 1000),
        lambda: storage.whole(f"{server.url}/a.bin"),
    ):
        begin = time.monotonic()
        with pytest.raises(OSError, match=r"within 0\.5 s \(\d+ tr.*\): (only|no answer|Timeout)"):
            read()
        assert time.monotonic() - begin < 10


def test_answers_of_a_wrong_length(server: Server):
    server.faults["/a.bin"] = [shorter]
    assert Storage(5.0).read(f"{server.url}/a.bin", 0, 1000) == DATA[:1000]
    server.always = shorter
    with pytest.raises(OSError, match="another number of bytes came"):
        Storage(0.3).read(f"{server.url}/a.bin", 0, 1000)


def test_a_server_without_ranges(server: Server, tmp_path: Path):
    server.ranges = False
    storage = Storage(5.0)
    assert not storage.stat(f"{server.url}/a.bin").ranges
    assert server.sent.get("/a.bin", 0) <= len(DATA)
    with pytest.raises(NoRanges, match=r"cannot be read in parts .*set data\.cache"):
        storage.read(f"{server.url}/a.bin", 10, 10)
    server.faults["/a.bin"] = [plain, cut(1000)]
    assert download(storage, f"{server.url}/a.bin", tmp_path) == DATA


def test_a_file_that_is_replaced_meanwhile(server: Server):
    storage = Storage(5.0)
    version = storage.stat(f"{server.url}/a.bin").version
    server.tag = '"two"'
    with pytest.raises(OSError, match="was replaced while it was read"):
        storage.read(f"{server.url}/a.bin", 0, 10, version)


def test_a_full_disk_is_told_apart(server: Server):
    file = os.open("/dev/full", os.O_RDWR)
    storage = Storage(5.0)
    with pytest.raises(CannotWrite, match="No space left"):
        storage.download(f"{server.url}/a.bin", file, 0, storage.stat(f"{server.url}/a.bin"))
    os.close(file)


def test_secrets_stay_out_of_messages(server: Server):
    address = f"http://user:hunter2@127.0.0.1:{server.server_port}/none.bin?token=s3cret"
    with pytest.raises(Gone) as gone:
        Storage(1.0).stat(address)
    with pytest.raises(OSError) as closed:
        Storage(0.2).stat("http://user:hunter2@127.0.0.1:9/x?token=s3cret")
    for error in (gone, closed):
        assert "hunter2" not in str(error.value) and "s3cret" not in str(error.value)
    assert public("s3://key:secret@bucket/a?b#c.tar") == "s3://bucket/a?b#c.tar"


def test_other_stores_by_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/store/a.bin", DATA)
    memory.pipe("/store/b.bin", b"b")
    storage = Storage(1.0, window=70_000)
    try:
        assert storage.stat("memory://store/a.bin").size == len(DATA)
        assert storage.read("memory://store/a.bin", 5, 10) == DATA[5:15]
        found = storage.glob("memory://store/*.bin")
        assert found == ["memory://store/a.bin", "memory://store/b.bin"]
        with pytest.raises(Gone):
            storage.whole("memory://store/c.bin")
    finally:
        memory.rm("/store", recursive=True)
    check("memory://store/a.bin")
    with pytest.raises(ValueError, match=r"no store of kind nonsense:// is known\."):
        check("nonsense://x/a.tar")


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def refuse(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    with pytest.raises(
        OSError, match=r"needs more packages \(Install s3fs.*uv sync --extra remote"
    ):
        Storage(1.0).stat("s3://bucket/a.tar")
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"aiohttp is not installed.*uv sync --extra remote\."):
        check("https://host/a.tar")
