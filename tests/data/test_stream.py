from collections import Counter

import numpy as np
import pytest

from selfsight.data.rng import hash64
from selfsight.data.stream import (
    Permutation,
    Piece,
    Stream,
    UnknownPass,
    lane_sources,
    lanes_of,
)


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


def order(stream: Stream, turns: int) -> list[Piece]:
    """The pieces of all lanes, turn by turn."""
    return [stream.piece(lane, t) for t in range(turns) for lane in range(stream.lanes)]


def test_epochs_are_uncorrelated():
    length = 5000
    stream = Stream([length], 1, 1, seed=0)
    orders = np.array(
        [[stream.piece(0, e * length + i).shard for i in range(length)] for e in (0, 1)]
    )
    assert abs(np.corrcoef(orders)[0, 1]) < 4 / np.sqrt(length)
    assert (orders[0] == orders[1]).sum() < 10


@pytest.mark.parametrize("pieces", [1, 3, 16])
@pytest.mark.parametrize(("shards", "lanes"), [(3, 8), (10, 4), (64, 16), (1, 4), (101, 7)])
def test_each_pass_holds_each_piece_once(shards, lanes, pieces):
    stream = Stream([shards], pieces, lanes, seed=3)
    read = order(stream, 3 * shards * pieces)
    for epoch in range(3):
        seen = [(shard, piece) for e, shard, piece in read if e == epoch]
        assert sorted(seen) == [(s, p) for s in range(shards) for p in range(pieces)]
    passes = [epoch for epoch, _, _ in read]
    assert passes == sorted(passes)


def test_neighbouring_lanes_share_a_shard():
    stream = Stream([100], 4, 8, seed=0)
    shards = [[stream.piece(lane, turn).shard for lane in range(8)] for turn in range(20)]
    assert all(len(set(turn[:4])) == len(set(turn[4:])) == 1 for turn in shards)


def test_members_of_a_piece_have_an_order_of_their_own():
    stream = Stream([5], 2, 4, seed=0)
    orders = [
        tuple(stream.members(Piece(epoch, shard, number), 50)(np.arange(50)).tolist())
        for epoch in range(3)
        for shard in range(5)
        for number in range(2)
    ]
    assert len(set(orders)) == 30 and all(sorted(o) == list(range(50)) for o in orders)


def test_a_piece_depends_on_nothing_else():
    a, b = Stream([1000], 1, 8, seed=1), Stream([1000], 1, 8, seed=1)
    forward = [a.piece(lane, turn) for turn in range(300) for lane in range(8)]
    backward = [b.piece(lane, t) for t in reversed(range(300)) for lane in reversed(range(8))]
    assert forward == backward[::-1]
    assert forward[:100] != order(Stream([1000], 1, 8, seed=2), 13)[:100]


def test_a_growing_stream_asks_for_each_pass():
    stream = Stream([3], 2, 4, seed=0, grows=True)
    first = [stream.piece(lane, turn) for turn in range(1) for lane in range(4)]
    first += [stream.piece(lane, 1) for lane in range(2)]
    assert {p.epoch for p in first} == {0}
    with pytest.raises(UnknownPass) as asked:
        stream.piece(2, 1)
    assert asked.value.epoch == 1
    stream.settle(1, 5)
    later = [stream.piece(2, 1), stream.piece(3, 1), *(stream.piece(n, 2) for n in range(4))]
    later += [stream.piece(n, 3) for n in range(4)]
    assert sorted(p[1:] for p in later) == [(s, p) for s in range(5) for p in range(2)]
    with pytest.raises(UnknownPass):
        stream.piece(0, 4)
    # what was settled at once or one by one is the same order, and settling again changes nothing
    stream.settle(1, 5)
    whole = Stream([3, 5], 2, 4, seed=0, grows=True)
    assert [whole.piece(n % 4, n // 4) for n in range(16)] == [
        stream.piece(n % 4, n // 4) for n in range(16)
    ]


@pytest.mark.parametrize("weights", [[1.0], [3, 1], [0.9, 0.05, 0.05], [1, 1, 1], [100, 1]])
@pytest.mark.parametrize("lanes", [8, 64, 256])
def test_sources_get_their_share_of_the_lanes(weights, lanes):
    sources = lane_sources(weights, lanes)
    counts = np.bincount(sources, minlength=len(weights))
    exact = np.array(weights) * lanes / sum(weights)
    assert counts.sum() == lanes and counts.min() >= 1
    assert (np.abs(counts - exact) < 1).all() or exact.min() < 1
    # every half of the lanes has about half of each
    half = np.bincount(sources[: lanes // 2], minlength=len(weights))
    assert (np.abs(half - counts / 2) <= 1).all()


def test_more_sources_than_lanes():
    with pytest.raises(ValueError, match="3 sources cannot share a batch of 2 images"):
        lane_sources([1, 1, 1], 2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_lanes(world_size):
    shares = [lanes_of(rank, world_size, 16) for rank in range(world_size)]
    assert [lane for share in shares for lane in share] == list(range(16))


def test_lanes_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch of 10 images cannot be shared by 4 ranks"):
        lanes_of(0, 4, 10)
