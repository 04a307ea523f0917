from collections import Counter

import numpy as np
import pytest

from selfsight.data.rng import hash64
from selfsight.data.stream import Permutation, Stream, lanes_of


@pytest.mark.parametrize("key", [0, 1, hash64("any")])
def test_permutation_is_a_bijection_for_every_small_length(key):
    for length in range(1, 400):
        order = Permutation(length, key)(np.arange(length))
        assert np.array_equal(np.sort(order), np.arange(length)), length


def test_permutation_of_an_array_is_that_of_each():
    for length in (1, 2, 3, 10, 97, 4096):
        permute = Permutation(length, 5)
        assert permute(np.arange(length)).tolist() == [permute(i) for i in range(length)]


@pytest.mark.parametrize("length", [10**6 + 3, 10**9, 10**12])
def test_permutation_of_a_large_length(length):
    permute = Permutation(length, 9)
    index = np.unique(np.random.default_rng(0).integers(0, length, 20000))
    image = permute(index)
    assert image.min() >= 0 and image.max() < length
    assert len(np.unique(image)) == len(index)
    # spread over the whole range, and neither order nor distance survives
    assert abs(image.mean() / length - 0.5) < 0.01
    assert abs(np.corrcoef(index, image)[0, 1]) < 0.03
    steps = np.diff(permute(np.arange(10000)))
    assert len(np.unique(steps)) > 9000


def test_permutation_places_are_uniform_over_keys():
    length, keys = 20, 8000
    counts = np.zeros((length, length))
    for key in range(keys):
        counts[np.arange(length), Permutation(length, hash64(key))(np.arange(length))] += 1
    expected = keys / length
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = (length - 1) ** 2
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def test_permutations_of_short_lengths_all_occur():
    seen = Counter(tuple(Permutation(3, hash64(key))(np.arange(3)).tolist()) for key in range(3000))
    assert len(seen) == 6 and min(seen.values()) > 300


def test_epochs_are_uncorrelated():
    length = 5000
    stream = Stream(length, 1, seed=0)
    orders = np.array(
        [[stream.entry(0, e * length + i).item for i in range(length)] for e in (0, 1)]
    )
    assert abs(np.corrcoef(orders)[0, 1]) < 4 / np.sqrt(length)
    assert (orders[0] == orders[1]).sum() < 10


@pytest.mark.parametrize(("length", "lanes"), [(3, 8), (10, 4), (64, 16), (1, 4), (101, 7)])
def test_each_epoch_holds_each_item_once(length, lanes):
    stream = Stream(length, lanes, seed=3)
    entries = [stream.entry(lane, i) for i in range(3 * length) for lane in range(lanes)]
    assert [e.position for e in entries] == list(range(3 * length * lanes))
    for epoch in range(3):
        items = [e.item for e in entries if e.epoch == epoch]
        assert sorted(items) == list(range(length))


def test_an_entry_depends_on_nothing_else():
    a, b = Stream(1000, 8, seed=1), Stream(1000, 8, seed=1)
    forward = [a.entry(lane, i) for i in range(300) for lane in range(8)]
    backward = [b.entry(lane, i) for i in reversed(range(300)) for lane in reversed(range(8))]
    assert forward == backward[::-1]
    assert forward[:100] != [Stream(1000, 8, seed=2).entry(n % 8, n // 8) for n in range(100)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_lanes(world_size):
    shares = [lanes_of(rank, world_size, 16) for rank in range(world_size)]
    assert [lane for share in shares for lane in share] == list(range(16))


def test_lanes_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch of 10 images cannot be shared by 4 ranks"):
        lanes_of(0, 4, 10)
