"""Shards on real servers on the loopback: HTTP with its faults, and S3."""

import pickle
from pathlib import Path

import pytest
import torch

from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources import storage as storage_module
from selfsight.data.sources import tar_index
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Gone
from tests.data.stores import S3_ENVIRONMENT, Bucket, Server, cut, s3_server, serving, status
from tests.data.tars import everything, expected, shard, tar_of, write


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for s in range(3):
        write(tmp_path / "set" / f"web-{s:06d}.tar", shard(s))
    return tmp_path / "set"


@pytest.fixture
def server(shards: Path):
    with serving(shards) as running:
        yield running


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_web_shards_hold_the_same(server: Server, tmp_path: Path, cached: bool, flat: bool):
    source = TarShards(
        f"{server.url}/web-{{000000..000002}}.tar",
        cache=str(tmp_path / "cache") if cached else None,
        whole_index=flat,
        pieces=3,
    )
    assert source.threads > 0
    assert everything(source) == expected()
    sizes = {f"/web-{s:06d}.tar": len(tar_of(shard(s))) for s in range(3)}
    for path, size in sizes.items():
        if cached:  # once, and a byte for its size
            assert server.sent[path] == size + 1
        else:  # its headers and its images
            assert server.sent[path] < 2 * size + 2
    if not cached and not flat:  # a size, a look for an index, the headers, three pieces
        assert len(server.log) == 3 * (1 + 1 + 1 + 3)
    again = pickle.loads(pickle.dumps(source))
    assert everything(again) == expected()
    if cached:
        assert server.sent == {path: size + 1 for path, size in sizes.items()}
        cold = TarShards(source._asked, cache=str(tmp_path / "cache"), whole_index=False)
        assert len(cold) == 60  # the indexes are beside the shards in the cache


def test_a_remote_index_beside_its_shard_is_used(server: Server, shards: Path, tmp_path: Path):
    for path in shards.glob("*.tar"):
        tar_index.write_index(path)
    address = f"{server.url}/web-{{000000..000002}}.tar"
    source = TarShards(address, pieces=2, index=str(tmp_path / "index"))
    assert everything(source) == expected()
    assert len(server.log) == 3 * (1 + 1 + 2)
    server.log.clear()
    again = TarShards(address, pieces=2, index=str(tmp_path / "index"))
    assert everything(again) == expected()
    assert len(server.log) == 3 * (1 + 2)


def test_a_store_with_faults(server: Server, tmp_path: Path):
    paths = [f"/web-{s:06d}.tar" for s in range(3)]
    for path in paths:
        server.faults[path] = [status(500), status(500), cut(5000), cut(5000), status(503)]
    for cache in (str(tmp_path / "cache"), None):
        source = TarShards(f"{server.url}/web-{{000000..000002}}.tar", cache=cache)
        assert everything(source) == expected()


def test_a_store_without_ranges(server: Server, tmp_path: Path):
    server.ranges = False
    address = f"{server.url}/web-{{000000..000002}}.tar"
    assert everything(TarShards(address, cache=str(tmp_path / "cache"))) == expected()
    with pytest.raises(OSError, match=r"cannot be read in parts.*set data\.cache"):
        TarShards(address, cache=str(tmp_path / "cache"), cache_gb=0).length(0, 0)


def test_a_remote_shard_that_is_gone(server: Server, shards: Path):
    source = TarShards(f"{server.url}/web-{{000000..000003}}.tar", pieces=4)
    with pytest.raises(Gone, match=r"web-000003\.tar is not there"):
        source.length(3, 0)
    (shards / "web-000002.tar").unlink()
    with pytest.raises(Gone):
        source.length(2, 0)
    assert source.fetch(1, 0, 0) == expected()[20]


def test_a_cache_without_room_is_passed_by(server: Server, tmp_path: Path):
    size = len(tar_of(shard(0)))
    source = TarShards(
        f"{server.url}/web-{{000000..000002}}.tar",
        cache=str(tmp_path / "cache"),
        cache_gb=1.5 * size / 1e9,
    )
    with pytest.warns(RuntimeWarning, match="are read by ranges") as warned:
        assert everything(source) == expected()  # all three stay open
    assert len(warned) == 1
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= 1.5 * size


def test_addresses_with_secrets(server: Server, tmp_path: Path):
    address = f"http://user:hunter2@127.0.0.1:{server.server_port}"
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{address}/web-{s:06d}.tar?sig=s3cret{s}\n" for s in range(2)))
    source = TarShards(str(path))
    assert everything(source) == expected(2)
    assert any("sig=s3cret1" in asked for asked, _ in server.log)
    shown = [source.name, source.fingerprint(), *source.listing(), *map(str, everything(source))]
    assert not any("hunter2" in text or "s3cret" in text for text in shown)
    with path.open("a") as file:
        file.write(f"{address}/web-000002.tar?sig=s3cret2\n")
    worker = pickle.loads(pickle.dumps(source))
    worker.extend(source.poll())
    assert everything(worker) == expected()
    resumed = TarShards(str(path))
    resumed.adopt(source.listing())
    assert everything(resumed) == expected(2)
    path.write_text("http://h/a.tar?x=1\nhttp://h/a.tar?x=2\n")
    with pytest.raises(ValueError, match="two shards are named"):
        TarShards(str(path))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("s3fs", reason="needs uv sync --extra remote")
    pytest.importorskip("moto", reason="needs moto's server")
    with s3_server(tmp_path_factory.mktemp("moto") / "log.txt") as endpoint:
        yield Bucket(endpoint, "images")


def test_s3(bucket: Bucket, monkeypatch, tmp_path: Path):
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": bucket.endpoint}.items():
        monkeypatch.setenv(name, value)
    for s in range(3):
        bucket.put(f"set/web-{s:06d}.tar", tar_of(shard(s)))
    for cache in (None, str(tmp_path / "cache")):
        source = TarShards("s3://images/set/web-*.tar", cache=cache, pieces=4)
        assert source.listing() == [f"web-{s:06d}.tar" for s in range(3)] and source.name == "set"
        assert everything(source) == expected()
    for form in ("s3://images/set", "s3://images/set/", "s3://images/set/web-{000000..000002}.tar"):
        assert TarShards(form).listing() == source.listing()
    bucket.put("list.txt", b"set/web-000000.tar\nset/web-000001.tar\n")
    assert everything(TarShards("s3://images/list.txt")) == expected(2)

    bucket.put("set/web-000003.tar", tar_of(shard(3)))
    source = TarShards("s3://images/set/web-*.tar", pieces=4)
    bucket.put("set/web-000004.tar", tar_of(shard(4)))
    assert source.poll() == ["web-000004.tar"]
    bucket.delete("set/web-000003.tar")
    with pytest.raises(Gone, match=r"s3://images/set/web-000003\.tar is not there"):
        source.length(3, 0)
    assert source.fetch(0, 0, 0) == expected()[0]
    with pytest.raises(ValueError, match="no shard is found at s3://images/none"):
        TarShards("s3://images/none/*.tar")


def test_batches_are_the_same_from_anywhere(tmp_path: Path, picture, encode):
    """The loader's batches from a disk, a server and the cache, here and in worker processes."""
    for s in range(3):
        members = {
            f"{s}{n}.jpg": encode(picture(10 * s + n, 40, 32)) if n != 3 else b"no image"
            for n in range(9)
        }
        write(tmp_path / "set" / f"web-{s}.tar", members)
    crops = MultiCrop({"global": CropGroup(16, 2, (0.14, 1.0))})
    batches: list[list] = []
    with serving(tmp_path / "set") as server:
        server.faults = {f"/web-{s}.tar": [status(500), cut(1000)] for s in range(3)}
        address = f"{server.url}/web-{{0..2}}.tar"
        cases: list[tuple[TarShards, int]] = [
            (TarShards(f"{tmp_path}/set/web-{{0..2}}.tar", whole_index=False, pieces=4), 0),
            (TarShards(address, pieces=4), 0),
            (TarShards(address, pieces=4), 2),
            (TarShards(address, pieces=4, cache=str(tmp_path / "cache")), 2),
        ]
        for source, workers in cases:
            with Loader(source, crops, batch_size=4, seed=3, workers=workers) as loader:
                batches.append([])
                for _ in range(14):  # two passes and a little
                    batch = next(loader)
                    batches[-1] += [batch.positions.clone(), batch.views[0].clone()]
    for case in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(case, batches[0], strict=True))
