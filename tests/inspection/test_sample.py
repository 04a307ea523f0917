"""The sample is what a run reads first, each image once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from selfsight.data.loader import Loader
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.sources.mixture import Mixture
from selfsight.data.sources.source import Record, Source
from selfsight.inspection.sample import CHUNK, Entry, Sample
from tests.data.sharded import NumberShards


class Numbers(Source):
    """Image n is a plain square of label n; those of `broken` cannot be read."""

    def __init__(self, length: int, name: str = "numbers", threads: int = 0, broken=()):
        self.name, self.threads = name, threads
        self._length, self._broken = length, set(broken)

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def read(self, index: int) -> Record:
        if index in self._broken:
            raise OSError(f"number {index}\nis broken")
        return Record(self.key(index), np.full((8, 8, 3), index % 256, np.uint8), index)


def entries(source: Source, batch_size: int, limit: int = 10**6, seed: int = 3) -> list[Entry]:
    return [entry for chunk in Sample(source, batch_size, seed).chunks(limit) for entry in chunk]


def labels(found: list[Entry]) -> list[int | None]:
    return [None if entry.record is None else entry.record.label for entry in found]


def test_it_is_what_the_loader_of_a_run_hands_out_first():
    source = Numbers(100)
    groups = {"all": CropGroup(size=8, count=2, scale=(1.0, 1.0))}
    with Loader(source, MultiCrop(groups), batch_size=8, seed=3) as loader:
        batches = [next(loader).labels.tolist() for _ in range(12)]
    assert labels(entries(source, 8, 96)) == [label for batch in batches for label in batch]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_each_image_comes_once(batch_size):
    sample = Sample(Numbers(150), batch_size, 0)
    chunks = list(sample.chunks(1000))
    assert all(0 < len(chunk) <= CHUNK for chunk in chunks)
    assert {label for c in chunks for label in labels(c)} == set(range(150))
    assert sum(map(len, chunks)) == 150
    assert sample.complete


def test_it_ends_at_the_limit_and_says_that_there_is_more():
    sample = Sample(Numbers(150), 16, 0)
    assert [len(chunk) for chunk in sample.chunks(70)] == [64, 6]
    assert not sample.complete
    exact = Sample(Numbers(20), 16, 0)
    assert [len(chunk) for chunk in exact.chunks(20)] == [20]
    assert exact.complete


def test_reads_in_flight_change_nothing():
    here = entries(Numbers(90, broken=(4, 50)), 16)
    there = entries(Numbers(90, broken=(4, 50), threads=5), 16)
    assert [(e.key, e.error) for e in here] == [(e.key, e.error) for e in there]
    bad = [e for e in here if e.record is None]
    assert sorted(e.key for e in bad) == ["numbers/4", "numbers/50"]
    assert {e.error for e in bad} == {"number 4 is broken", "number 50 is broken"}


@pytest.mark.parametrize("threads", [0, 3])
def test_shards_are_read_piece_by_piece(tmp_path, threads):
    for shard in range(5):
        lines = [str(100 * shard + n) for n in range(10, 20)]
        (tmp_path / f"s{shard}.txt").write_text("\n".join(lines))
    source = NumberShards(tmp_path, pieces=3, threads=threads)
    (tmp_path / "s2.txt").unlink()
    found = entries(source, 8)
    good = [label for label in labels(found) if label is not None]
    wanted = [100 * s + n for s in (0, 1, 3, 4) for n in range(10, 20) if n != 13]
    assert sorted(good) == wanted
    errors = Counter(e.error for e in found if e.record is None)
    assert errors == {"an unlucky number": 4, "s2.txt is gone": 3}  # three pieces of that shard


def test_a_mixture_comes_in_its_proportions():
    parts = {"a": Numbers(1000, "x"), "b": Numbers(1000, "y")}
    found = entries(Mixture(parts, {"a": 3, "b": 1}), 16, 160)
    assert Counter(e.source for e in found) == {0: 120, 1: 40}
    assert all(e.key.startswith(("a/x/", "b/y/")[e.source]) for e in found)


def test_of_a_small_source_of_a_mixture_nothing_is_read_twice():
    found = entries(Mixture({"a": Numbers(100, "x"), "b": Numbers(3, "y")}, {"a": 1, "b": 1}), 8)
    assert Counter(e.source for e in found) == {0: 100, 1: 3}
    assert len({e.key for e in found}) == 103
