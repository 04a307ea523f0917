import numpy as np

from selfsight.data.rng import GOLDEN, MASK, hash64, mix, uniforms


def test_mix_is_splitmix64():
    # The published outputs of SplitMix64 for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + n * GOLDEN) & MASK) for n in (1, 2, 3)] == expected


def test_mix_of_an_array_is_mix_of_each():
    words = [0, 1, 2**63, MASK, 123456789]
    assert mix(np.array(words, dtype=np.uint64)).tolist() == [mix(word) for word in words]


def test_hash_separates_its_parts():
    assert hash64("a", 1) == hash64("a", 1)
    assert len({hash64("a", 1), hash64("a1"), hash64(1, "a"), hash64("a", 2)}) == 4
    hash64("caf\udce9.jpg")  # a file name that is not UTF-8


def test_uniforms_are_uniform_and_independent():
    u = uniforms(np.array([hash64(n) for n in range(4000)], dtype=np.uint64), 8)
    assert u.shape == (4000, 8) and u.min() >= 0 and u.max() < 1
    ordered = np.sort(u, axis=0)
    grid = (np.arange(4000) + 0.5) / 4000
    # Kolmogorov-Smirnov; 1.95 / sqrt(n) is the 0.1 % point.
    assert np.abs(ordered - grid[:, None]).max() < 1.95 / np.sqrt(4000)
    correlation = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


def test_a_draw_does_not_depend_on_how_many_are_made():
    seeds = np.array([3, 4], dtype=np.uint64)
    assert np.array_equal(uniforms(seeds, 5), uniforms(seeds, 50)[:, :5])
