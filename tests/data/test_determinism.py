"""The next batches are bitwise the same whoever reads them, from wherever they are gone on with.

For every source but live URLs: ids, labels, cursors and pixels, for ranks 1, 2, 4 and 0, 1, 2
workers, fresh and gone on with at random points. In CI each source goes through some of the
combinations over fewer batches; `-m slow` goes through all, over 100.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsight.data.lanes import sources_of
from selfsight.data.ledger import Ledger
from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources.folder import ImageFolder
from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.packed import PackedNpz
from selfsight.data.sources.shards import TarShards
from selfsight.data.sources.source import Source
from selfsight.data.sources.synthetic import SyntheticScenes
from selfsight.data.stream_log import StreamLog
from tests.data.stores import S3_ENVIRONMENT, Bucket, s3_server, serving
from tests.data.tars import tar_of

BATCH = 8
SHARDS, EACH = 5, 11
Step = tuple[Tensor, ...]


class Place:
    """The same images in every kind of store, damaged ones among them."""

    def __init__(self, folder: Path, encode: Callable, picture: Callable) -> None:
        self.folder = folder
        self.shards: list[bytes] = []
        images: list[bytes] = []
        for s in range(SHARDS):
            members = {}
            for n in range(EACH):
                image = encode(picture(100 * s + n, 40 + n, 30 + s))
                members[f"{n:03d}.jpg"] = image[: len(image) // 2] if n == 4 else image
                members[f"{n:03d}.cls"] = str(100 * s + n).encode()
            self.shards.append(tar_of(members))
            images += [data for name, data in members.items() if name.endswith("jpg")]
            for name, data in members.items():
                file = folder / "files" / f"class{s % 2}" / f"{s}-{name}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        (folder / "tars").mkdir()
        for s, data in enumerate(self.shards):
            (folder / "tars" / f"{s}.tar").write_bytes(data)
        np.savez(
            folder / "set.npz",
            train_bytes=np.frombuffer(b"".join(images), np.uint8),
            train_offsets=np.cumsum([0, *map(len, images)]),
            train_labels=np.arange(len(images)),
        )
        self.tars = str(folder / "tars")


@pytest.fixture(scope="module")
def place(tmp_path_factory, encode, picture) -> Place:
    return Place(tmp_path_factory.mktemp("place"), encode, picture)


@pytest.fixture
def source(place: Place, request, monkeypatch, tmp_path) -> Iterator[Callable[[], Source]]:
    """Builds the source of the test's name anew, as another process would."""
    kind = request.param
    if kind == "folder":
        yield lambda: ImageFolder(str(place.folder / "files"), labels="folders")
    elif kind == "packed":
        yield lambda: PackedNpz(str(place.folder / "set.npz"))
    elif kind == "synthetic":
        yield lambda: SyntheticScenes(40)
    elif kind == "huggingface":
        datasets = pytest.importorskip("datasets", reason="needs uv sync --extra huggingface")
        from selfsight.data.sources.huggingface import HuggingFaceImages

        files = sorted((place.folder / "files").rglob("*.jpg"))
        kept = tmp_path / "hf"
        table = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        datasets.Dataset.from_dict(table, features=features).save_to_disk(str(kept))
        yield lambda: HuggingFaceImages(str(kept))
    elif kind == "shards":
        yield lambda: TarShards(place.tars)
    elif kind in ("pieces", "growing"):
        yield lambda: TarShards(
            place.tars, pieces=3, whole_index=False, grows=kind == "growing", index=str(tmp_path)
        )
    elif kind in ("http", "http-cache"):
        cache = str(tmp_path / "cache") if kind == "http-cache" else None
        with serving(place.folder / "tars") as server:
            address = f"{server.url}/{{0..{SHARDS - 1}}}.tar"
            yield lambda: TarShards(address, pieces=3, cache=cache, index=str(tmp_path / "index"))
    elif kind == "s3":
        pytest.importorskip("s3fs", reason="needs uv sync --extra remote")
        with s3_server(tmp_path / "moto.log") as endpoint:
            for key, value in S3_ENVIRONMENT.items():
                monkeypatch.setenv(key, value)
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            bucket = Bucket(endpoint, "web")
            for s, data in enumerate(place.shards):
                bucket.put(f"{s}.tar", data)
            cache = str(tmp_path / "cache")
            yield lambda: TarShards("s3://web/*.tar", pieces=2, cache=cache)
    else:
        assert kind == "mixture"
        yield lambda: Mixture(
            {
                "web": TarShards(place.tars, pieces=2, whole_index=False),
                "photos": ImageFolder(str(place.folder / "files"), labels=None),
                "scenes": SyntheticScenes(30),
            },
            {"web": 4, "photos": 2, "scenes": 1},
        )


def read(
    source: Source,
    steps: int,
    run: Path,
    *,
    ranks: int = 1,
    workers: int = 0,
    cursors: Tensor | None = None,
) -> list[Step]:
    """The next global batches: ids, labels, cursors, views."""
    crops = MultiCrop({"g": CropGroup(16, 2, (0.2, 1.0)), "l": CropGroup(8, 2, (0.05, 0.2))})
    log = StreamLog(run / "stream.jsonl", sources_of(source), fresh=cursors is None)
    loaders = [
        Loader(
            source, crops, batch_size=BATCH, seed=11, rank=rank, world_size=ranks,
            workers=workers, ledger=Ledger(run / "ledger.jsonl"), log=log,
            cursors=None if cursors is None else cursors.view(ranks, -1, 3)[rank].clone(),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    found = []
    try:
        for _ in range(steps):
            parts = []
            for loader in loaders:
                batch = next(loader)
                views = [view.transpose(0, 1).clone() for view in batch.views]
                parts.append((batch.positions, batch.labels, loader.cursors, *views))
            found.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    finally:
        for loader in loaders:
            loader.close()
    return found


def check(source: Callable[[], Source], folder: Path, steps: int, cases: list) -> None:
    expected = read(source(), 2 * steps, folder / "whole")
    assert len({tuple(e[0].tolist()) for e in expected}) == 2 * steps
    for number, (ranks, workers, at) in enumerate(cases):
        run = folder / str(number)
        options = {"ranks": ranks, "workers": workers}
        if at == 0:
            found = read(source(), steps, run, **options)
        else:  # what led there was read by others, of whom log and ledger are left
            cursors = read(source(), at, run, ranks=2, workers=1)[-1][2]
            found = read(source(), steps, run, cursors=cursors, **options)
        for k, (one, other) in enumerate(zip(found, expected[at : at + steps], strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (
                f"batch {at + k} with {ranks} ranks and {workers} workers, from batch {at}"
            )


KINDS = ["folder", "packed", "synthetic", "huggingface", "shards", "pieces", "growing", "mixture"]
KINDS += ["http", "http-cache", "s3"]


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_some_combinations(source, tmp_path, request):
    chosen = random.Random(request.node.name)
    cases = [(2, 2, 0), (1, 1, chosen.randint(1, 12)), (4, 0, chosen.randint(1, 12))]
    check(source, tmp_path, 12, cases)


@pytest.mark.slow
@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_all_combinations(source, tmp_path, request):
    chosen = random.Random(request.node.name)
    points = [0, *(chosen.randint(1, 100) for _ in range(5))]
    check(source, tmp_path, 100, list(itertools.product((1, 2, 4), (0, 1, 2), points)))
