"""The cache folder of remote shards, shared by processes, and windows in memory."""

import fcntl
import multiprocessing
import os
import random
import resource
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from selfsight.data.sources import storage as storage_module
from selfsight.data.sources.shard_cache import NoRoom, ShardCache, Windows
from selfsight.data.sources.source import Gone
from selfsight.data.sources.storage import Storage
from tests.data.stores import Server, cut, drip, plain, serving

SIZE = 100_000
CONTENT = {f"{n}.tar": random.Random(n).randbytes(SIZE) for n in range(6)}


@pytest.fixture
def server(tmp_path: Path):
    for name, data in CONTENT.items():
        (tmp_path / "served").mkdir(exist_ok=True)
        (tmp_path / "served" / name).write_bytes(data)
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.01)


def cache_of(folder: Path, limit: int = 10 * SIZE, seconds: float = 10.0) -> ShardCache:
    return ShardCache(folder, limit, Storage(seconds))


def content(file: int) -> bytes:
    data = os.pread(file, SIZE + 1, 0)
    os.close(file)
    return data


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_fetched_once(server: Server, tmp_path: Path):
    folder = tmp_path / "cache"
    for _ in range(2):
        for name, data in CONTENT.items():
            assert content(cache_of(folder).open(f"{server.url}/{name}")) == data
    assert server.sent == {f"/{name}": SIZE + 1 for name in CONTENT}
    assert len(kept(folder)) == len(CONTENT) and all(n.endswith(".tar") for n in kept(folder))
    with pytest.raises(Gone):
        cache_of(folder).open(f"{server.url}/none.tar")
    assert len(kept(folder)) == len(CONTENT)


def test_a_cut_part_is_continued_by_the_next_process(server: Server, tmp_path: Path):
    folder = tmp_path / "cache"
    server.faults["/0.tar"] = [plain, cut(60_000)]
    server.always = drip(1.0)
    with pytest.raises(OSError, match="could not be read within"):
        cache_of(folder, seconds=0.3).open(f"{server.url}/0.tar")
    (part,) = folder.glob("*.part")
    assert part.stat().st_size >= 60_000
    have = part.stat().st_size
    server.always = None
    before = server.sent["/0.tar"]
    assert content(cache_of(folder).open(f"{server.url}/0.tar")) == CONTENT["0.tar"]
    assert server.sent["/0.tar"] - before == SIZE - have + 1
    assert not list(folder.glob("*.part"))


def test_a_part_of_another_version_is_not_continued(server: Server, tmp_path: Path):
    folder = tmp_path / "cache"
    server.faults["/0.tar"] = [plain, cut(60_000)]
    server.always = drip(1.0)
    with pytest.raises(OSError):
        cache_of(folder, seconds=0.2).open(f"{server.url}/0.tar")
    server.always, server.tag = None, '"two"'
    (server.folder / "0.tar").write_bytes(CONTENT["1.tar"])
    assert content(cache_of(folder).open(f"{server.url}/0.tar")) == CONTENT["1.tar"]


def test_the_limit_holds_and_the_least_used_goes(server: Server, tmp_path: Path):
    folder = tmp_path / "cache"
    cache = cache_of(folder, limit=3 * SIZE + 10)
    for n in (0, 1, 2, 0, 3, 0, 4):  # 0 is used again and again
        assert content(cache.open(f"{server.url}/{n}.tar")) == CONTENT[f"{n}.tar"]
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 3 * SIZE + 10
        time.sleep(0.01)  # clocks of files are coarse
    assert cache.path(f"{server.url}/0.tar").exists() and server.sent["/0.tar"] == SIZE + 1
    assert not cache.path(f"{server.url}/1.tar").exists()


def test_what_is_read_is_not_removed(server: Server, tmp_path: Path):
    folder = tmp_path / "cache"
    cache = cache_of(folder, limit=2 * SIZE)
    files = [cache.open(f"{server.url}/{n}.tar") for n in (0, 1)]
    with pytest.raises(NoRoom, match="are in use and fill it"):
        cache.open(f"{server.url}/2.tar")
    assert not list(folder.glob("*.part"))
    os.close(files.pop())
    assert content(cache.open(f"{server.url}/2.tar")) == CONTENT["2.tar"]
    assert content(files.pop()) == CONTENT["0.tar"]
    with pytest.raises(NoRoom, match="more than the limit of the cache"):
        cache_of(folder, limit=SIZE - 1).open(f"{server.url}/3.tar")


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoRoom, match="cannot be written"):
        cache_of(tmp_path / "file" / "cache").open(f"{server.url}/0.tar")


def test_a_disk_that_is_full(server: Server, tmp_path: Path):
    """A limit on the size of files stands for the disk: writing fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        with pytest.raises(NoRoom, match="cannot be written"):
            cache_of(tmp_path / "cache").open(f"{server.url}/0.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(tmp_path / "cache") == []
    assert content(cache_of(tmp_path / "cache").open(f"{server.url}/0.tar")) == CONTENT["0.tar"]


def _fetch_all(folder: Path, url: str, order: list[str], results) -> None:
    cache = cache_of(folder, seconds=30.0)
    results.put([content(cache.open(f"{url}/{name}")) == CONTENT[name] for name in order])


def _hold(part: Path, ready: Event) -> None:
    """Lock a part as one that fetches it does, and stay."""
    file = os.open(part, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, CONTENT["0.tar"][:1000], 0)
    fcntl.flock(file, fcntl.LOCK_EX)
    ready.set()
    time.sleep(60)


def test_processes_share_the_folder(server: Server, tmp_path: Path):
    """Each shard is downloaded once, whichever of three processes comes first."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    names = list(CONTENT)
    orders = [names, names[::-1], names[3:] + names[:3]]
    processes = [
        context.Process(target=_fetch_all, args=(tmp_path / "cache", server.url, o, results))
        for o in orders
    ]
    for process in processes:
        process.start()
    try:
        good = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert good == [[True] * len(CONTENT)] * 3
    bodies = [path for path, asked in server.log if asked != "bytes=0-0"]
    assert sorted(bodies) == sorted(f"/{name}" for name in CONTENT)


def test_a_dead_owner_does_not_block(server: Server, tmp_path: Path):
    """The process that fetches a shard is killed: the one that waits goes on from its part."""
    folder = tmp_path / "cache"
    folder.mkdir()
    address = f"{server.url}/0.tar"
    cache = cache_of(folder)
    server.faults["/0.tar"], server.always = [plain, cut(500)], drip(1.0)
    with pytest.raises(OSError):  # leaves a part
        cache_of(folder, seconds=0.3).open(address)
    server.always = None
    (part,) = folder.glob("*.part")
    assert f".{SIZE}." in part.name
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(part, ready))
    owner.start()
    got: list[bytes] = []
    waiter = threading.Thread(target=lambda: got.append(content(cache.open(address))))
    try:
        assert ready.wait(30)
        waiter.start()
        time.sleep(0.5)
        assert not got  # it waits for the owner
    finally:
        owner.kill()
        owner.join(10)
    waiter.join(20)
    assert got == [CONTENT["0.tar"]]
    assert server.log[-1][1] == f"bytes=1000-{SIZE - 1}"


# ---------------------------------------------------------------------------- windows in memory


def test_a_stretch_is_read_once_by_many_threads(server: Server):
    windows = Windows(Storage(10.0))
    address = f"{server.url}/0.tar"
    got: dict[int, bytes] = {}

    def read(n: int) -> None:
        got[n] = windows.read(address, '"one"', 100 * n, 50, 0, 20 * 100, 20)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: CONTENT["0.tar"][100 * n : 100 * n + 50] for n in range(20)}
    assert [asked for _, asked in server.log] == ["bytes=0-1999"]
    assert not windows._kept and windows._bytes == 0  # all of it was used


def test_too_little_memory_costs_requests_not_traffic(server: Server):
    windows = Windows(Storage(10.0), limit=2500)
    stretches = [(f"{server.url}/{n}.tar", 0, 1000) for n in range(4)]
    for _ in range(5):
        for n, (address, first, end) in enumerate(stretches):
            data = windows.read(address, "", 10, 100, first, end, 100)
            assert data == CONTENT[f"{n}.tar"][10:110]
    assert windows._bytes <= 2500
    assert sum(server.sent.values()) <= 4 * 1000 + 20 * 100
    long = windows.read(f"{server.url}/5.tar", "", 7, 5, 0, 1 << 30, 9)  # more than a window
    assert long == CONTENT["5.tar"][7:12] and server.sent["/5.tar"] == 5
