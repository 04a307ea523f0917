from itertools import pairwise

import numpy as np
import pytest

from selfsight.data.sources.part import Part, listed, split_indices
from selfsight.data.sources.synthetic import SyntheticScenes
from selfsight.evals.subsets import Amount, Subset, subsets, write_subset

LABELS = np.random.default_rng(0).integers(0, 5, 400)


def test_subsets_are_nested_deterministic_and_balanced():
    amounts = [Amount.parse(t) for t in ("1 a class", "5 a class", "10 %", "50 %")]
    found = subsets(LABELS, amounts, seed=3)
    for small, large in pairwise(found):
        assert set(small) < set(large)
    assert np.bincount(LABELS[found[1]]).tolist() == [5] * 5
    assert [
        np.array_equal(a, b) for a, b in zip(found, subsets(LABELS, amounts, seed=3), strict=True)
    ]
    assert not np.array_equal(found[1], subsets(LABELS, amounts, seed=4)[1])
    with pytest.raises(ValueError, match=r"the class 0 has .* and 200 a class are asked for"):
        subsets(LABELS, [Amount(shots=200)], seed=0)
    for wrong in ("ten", "0 %", "120 %", "-5"):
        with pytest.raises(ValueError, match="is neither a share"):
            Amount.parse(wrong)


def test_a_written_subset_is_read_back(tmp_path):
    source = SyntheticScenes(length=50)
    keys = [source.key(i) for i in (3, 7, 20)]
    path = write_subset(tmp_path, source.name, Subset("3shot", keys))
    part = listed(source, str(path))
    assert [part.key(i) for i in range(len(part))] == keys
    assert part.read(1).label == source.read(7).label
    with pytest.raises(ValueError, match="names 47 images that synthetic/train lacks"):
        everything = [source.key(i) for i in range(50)]
        listed(
            SyntheticScenes(length=3), str(write_subset(tmp_path, "all", Subset("x", everything)))
        )


def test_splits_share_nothing_and_keep_the_proportions_of_classes():
    train, val, test = split_indices(400, (0.8, 0.1, 0.1), 0, LABELS)
    assert sorted([*train, *val, *test]) == list(range(400))
    assert abs(len(val) - 40) <= 2 and abs(len(test) - 40) <= 2
    for part in (val, test):
        share = np.bincount(LABELS[part], minlength=5) / np.bincount(LABELS)
        assert (abs(share - 0.1) < 0.03).all()
    again = split_indices(400, (0.8, 0.1, 0.1), 0, LABELS)
    assert all(np.array_equal(a, b) for a, b in zip((train, val, test), again, strict=True))
    with pytest.raises(ValueError, match="must add up to 1"):
        split_indices(10, (0.5, 0.1), 0)


def test_a_part_is_told_apart_from_another():
    source = SyntheticScenes(length=20)
    one, two = Part(source, [1, 2], "a"), Part(source, [1, 3], "b")
    assert one.fingerprint() != two.fingerprint()
