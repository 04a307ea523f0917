"""Sources of real shards: pieces, mixtures, lists that grow, shards that vanish."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsight.data.lanes import sources_of
from selfsight.data.ledger import Ledger
from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.source import Excerpt
from selfsight.data.sources.synthetic import SyntheticScenes
from selfsight.data.stream_log import ForeignData, StreamLog
from tests.data.sharded import NumberShards, write_shard

BATCH = 8


def crops() -> MultiCrop:
    return MultiCrop({"g": CropGroup(8, 2, (0.3, 1.0))})


def make(folder: Path, shards: int = 5, each: int = 20, first: int = 0) -> Path:
    for s in range(shards):
        numbers = range(first + s * 1000, first + s * 1000 + each)
        write_shard(folder, f"{first + s:03d}", numbers)
    return folder


def batches(loader: Loader, steps: int):
    found = []
    for _ in range(steps):
        batch = next(loader)
        found.append((batch.positions, batch.labels, batch.views[0].clone(), loader.cursors))
    return found


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def run(source, steps, *, cursors=None, ranks=1, workers=0, ledger=None, log=None):
    parts = []
    for rank in range(ranks):
        own = None if cursors is None else cursors.view(ranks, -1, 3)[rank].clone()
        with Loader(
            source() if isinstance(source, Callable) else source, crops(), batch_size=BATCH,
            seed=3, rank=rank, world_size=ranks, workers=workers, cursors=own, ledger=ledger,
            log=log,
        ) as loader:  # fmt: skip
            parts.append(batches(loader, steps))
    return [
        tuple(torch.cat(t, dim=1 if t[0].ndim == 5 else 0) for t in zip(*p, strict=True))
        for p in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("threads", [0, 3])
def test_a_pass_over_shards_reads_each_image_once(tmp_path, threads):
    make(tmp_path / "s", shards=6, each=21)
    source = NumberShards(tmp_path / "s", pieces=4, threads=threads)
    found = run(source, 45, ledger=Ledger(tmp_path / "l.jsonl"))
    labels = torch.cat([labels for _, labels, *_ in found]).tolist()
    good = {n for s in range(6) for n in range(s * 1000, s * 1000 + 21) if n % 100 != 13}
    # lanes drift apart by less than two pieces: after three passes each came two to four times
    counts = Counter(labels)
    assert set(counts) == good and min(counts.values()) >= 2 and max(counts.values()) <= 4
    lines = [json.loads(x) for x in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"an unlucky number"}


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 0), (4, 1)])
def test_who_reads_changes_nothing(tmp_path, ranks, workers, threads):
    make(tmp_path / "s")
    expected = run(NumberShards(tmp_path / "s"), 12)
    source = NumberShards(tmp_path / "s", threads=threads)
    assert equal(run(source, 12, ranks=ranks, workers=workers), expected)
    for at in (0, 4, 7):
        cursors = expected[at][-1]
        again = run(source, 11 - at, ranks=ranks, workers=workers, cursors=cursors)
        assert equal(again, expected[at + 1 :])


def test_a_mixture_holds_its_proportions_in_every_batch(tmp_path):
    def mixed() -> Mixture:
        return Mixture(
            {
                "a": NumberShards(make(tmp_path / "a", first=0)),
                "b": NumberShards(make(tmp_path / "b", first=100_000)),
                "scenes": SyntheticScenes(length=50),
            },
            {"a": 5, "b": 2, "scenes": 1},
        )

    found = run(mixed, 20)
    for _, labels, *_ in found:
        kinds = Counter("b" if n >= 100_000 else "s" if n < 12 else "a" for n in labels.tolist())
        assert kinds["b"] == 2 and kinds["a"] + kinds["s"] == 6
    assert equal(run(mixed, 20, ranks=2, workers=2), found)
    again = run(mixed, 11, ranks=4, cursors=found[8][-1])
    assert equal(again, found[9:])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "have to name the same: b is on one side only"),
        ({"a": 1, "b": 0}, "the weight of the source b is 0: it must be above 0"),
    ],
)
def test_mistakes_in_a_mixture(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": SyntheticScenes(9), "b": SyntheticScenes(9)}, weights)
    with pytest.raises(ValueError, match="at least one source"):
        Mixture({})


def test_shards_join_at_the_next_pass_and_stay_in_the_log(tmp_path):
    folder = make(tmp_path / "s", shards=8, each=12)  # 16 pieces of 6: twelve batches a pass
    path = tmp_path / "run" / "stream.jsonl"

    def open_log() -> tuple[NumberShards, StreamLog]:
        source = NumberShards(folder, grows=True)
        return source, StreamLog(path, sources_of(source))

    def added() -> list[list[str]]:
        return [json.loads(line)["added"] for line in path.read_text().splitlines()]

    source, log = open_log()
    assert log.passes == [[8]]
    found = run(source, 3, log=log)
    write_shard(folder, "900", range(900_000, 900_012))  # joins while the first pass is read
    source, log = open_log()
    assert log.passes == [[8]] and source.shards() == 8
    found += run(source, 27, log=log, cursors=found[-1][-1], workers=2)
    labels = torch.stack([labels for _, labels, *_ in found])
    assert (labels[:12] < 900_000).all() and (labels[12:27] >= 900_000).any()
    names = [f"{n:03d}.txt" for n in range(8)]
    assert added()[:3] == [names, ["900.txt"], []]
    # another one: the passes that are settled are read again as they were
    write_shard(folder, "901", range(901_000, 901_012))
    source, log = open_log()
    assert log.passes[0][:3] == [8, 9, 9]
    again = run(open_log()[0], 27, log=log, cursors=found[2][-1], ranks=2, workers=1)
    assert equal(again, found[3:])
    assert source.founders == 8 and len(Excerpt(source, 8)) == 8


def test_a_shard_that_vanishes_is_passed_over_and_listed(tmp_path):
    folder = make(tmp_path / "s", shards=4, each=8)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    source = NumberShards(folder)
    kept = (folder / "002.txt").read_text()
    (folder / "002.txt").unlink()
    found = run(source, 10, ledger=ledger)
    labels = torch.cat([labels for _, labels, *_ in found])
    assert not ((labels >= 2000) & (labels < 3000)).any() and (labels >= 3000).any()
    lines = [json.loads(x) for x in ledger.path.read_text().splitlines()]
    assert {line["key"] for line in lines} == {"002.txt"}
    assert {line["reason"] for line in lines} == {"002.txt is gone"} and "turn" in lines[0]
    # it comes back: what a resumed run reads again stays as it was
    (folder / "002.txt").write_text(kept)
    again = run(source, 5, ledger=ledger, cursors=found[4][-1], workers=2)
    assert equal(again, found[5:])
    assert [json.loads(x) for x in ledger.path.read_text().splitlines()] == lines


def test_empty_shards_are_passed_over(tmp_path):
    make(tmp_path / "s", shards=2, each=4)
    write_shard(tmp_path / "s", "005", [])
    write_shard(tmp_path / "s", "006", [6000])
    source = NumberShards(tmp_path / "s", pieces=2)
    labels = torch.cat([labels for _, labels, *_ in run(source, 9)]).tolist()
    assert set(labels) == {0, 1, 2, 3, 1000, 1001, 1002, 1003, 6000}
    write_shard(tmp_path / "e", "000", [])
    with pytest.raises(ValueError, match="holds no image in"):
        run(NumberShards(tmp_path / "e"), 1)


def test_other_data_are_refused_on_resume(tmp_path):
    path = tmp_path / "stream.jsonl"
    StreamLog(path, [SyntheticScenes(10)])
    StreamLog(path, [SyntheticScenes(10)])
    with pytest.raises(ForeignData, match=r"has changed: it listed 10 images .* and now 11 images"):
        StreamLog(path, [SyntheticScenes(11)])
    with pytest.raises(ForeignData, match=r"was synthetic/train when this run was started"):
        StreamLog(path, [SyntheticScenes(10, split="val")])
    StreamLog(path, [SyntheticScenes(11)], strict=False)
    StreamLog(path, [SyntheticScenes(11)])
    StreamLog(path, [SyntheticScenes(12)], fresh=True)
    path.write_text(path.read_text() + '{"source": 0, "na')  # cut by a kill
    StreamLog(path, [SyntheticScenes(12)])
    assert len(path.read_text().splitlines()) == 1


def test_too_many_bad_samples_end_the_run(tmp_path):
    numbers = [13 if n % 3 == 0 else n for n in range(600) if n % 100 != 13]
    write_shard(tmp_path / "s", "000", numbers)
    source = NumberShards(tmp_path / "s")
    with Loader(source, crops(), batch_size=BATCH, seed=0, max_bad_share=0.5) as loader:
        batches(loader, 200)
    with (
        Loader(source, crops(), batch_size=BATCH, seed=0, max_bad_share=0.3) as loader,
        pytest.raises(ValueError, match=r"samples could not be used, more than .* an unlucky"),
    ):
        batches(loader, 200)


def test_an_excerpt_is_spread_over_few_shards(tmp_path):
    make(tmp_path / "s", shards=20, each=10)
    source = NumberShards(tmp_path / "s")
    excerpt = Excerpt(source, 40)
    labels = [excerpt.read(i).label for i in range(len(excerpt)) if "13" not in excerpt.key(i)]
    assert len(excerpt) == 40 and len({n // 1000 for n in labels if n is not None}) == 8
    flat = Excerpt(SyntheticScenes(100), 10)
    assert [flat.key(i) for i in range(10)] == [f"train/0/{i * 10}" for i in range(10)]
    assert np.array_equal(flat.read(3).data, SyntheticScenes(100).read(30).data)
