import os
import pickle
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import pytest

from selfsight.data.sources.scenes import OUTLINES, PATTERNS, TURN, Dice
from selfsight.data.sources.synthetic import SyntheticScenes

ROOT = Path(__file__).resolve().parents[2]

_PRINT_DIGESTS = """
from zlib import crc32
from selfsight.data.sources.synthetic import SyntheticScenes
source = SyntheticScenes(seed=3)
print(*(crc32(source.read(index).data.tobytes()) for index in range(24)))
"""


def pixels(source: SyntheticScenes, index: int) -> np.ndarray:
    data = source.read(index).data
    assert isinstance(data, np.ndarray)
    return data


def test_records_are_rgb_images_of_varied_size_with_a_label_and_a_unique_key():
    source = SyntheticScenes(length=300)
    records = [source.read(index) for index in range(len(source))]
    shapes = [np.shape(record.data) for record in records]
    assert all(np.asarray(record.data).dtype == np.uint8 for record in records)
    assert all(56 <= h <= 96 and 56 <= w <= 96 and c == 3 for h, w, c in shapes)
    assert len(set(shapes)) > 200
    assert sum(h != w for h, w, _ in shapes) > 250
    assert len({record.key for record in records}) == 300
    assert [record.key for record in records] == [source.key(index) for index in range(300)]
    assert source.classes is not None and len(source.classes) == 12
    counts = np.bincount([record.label or 0 for record in records], minlength=12)
    assert counts.size == 12 and counts.min() > 8


def test_neither_pattern_nor_kind_decides_the_class():
    classes = SyntheticScenes().classes
    assert classes is not None
    pairs = [name.split(" on ") for name in classes]
    assert len(set(classes)) == 12
    assert all(sum(kind == k for k, _ in pairs) == 2 for kind in OUTLINES)
    assert all(sum(pattern == p for _, p in pairs) == 2 for pattern in PATTERNS)


def test_an_image_depends_on_seed_split_and_index_alone():
    source = SyntheticScenes(seed=3)
    straight = [pixels(source, index) for index in range(6)]
    backwards = [pixels(SyntheticScenes(length=6, seed=3), index) for index in reversed(range(6))]
    copy = pickle.loads(pickle.dumps(source))
    for index, image in enumerate(straight):
        np.testing.assert_array_equal(image, backwards[5 - index])
        np.testing.assert_array_equal(image, pixels(copy, index))


def test_another_process_draws_the_same_bits():
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "ssl"), OMP_NUM_THREADS="3")
    other = subprocess.run(
        [sys.executable, "-c", _PRINT_DIGESTS],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    source = SyntheticScenes(seed=3)
    here = [crc32(pixels(source, index).tobytes()) for index in range(24)]
    assert [int(word) for word in other.stdout.split()] == here


def test_splits_and_seeds_share_no_image():
    sources = [
        SyntheticScenes(),
        SyntheticScenes(split="val"),
        SyntheticScenes(seed=1),
        SyntheticScenes(seed=1, split="val"),
    ]
    digests = [crc32(pixels(source, i).tobytes()) for source in sources for i in range(150)]
    assert len(set(digests)) == 600
    assert len({source.key(0) for source in sources}) == 4


def test_dice_are_philox_words_scaled_to_the_range():
    dice = Dice(seed=5, stream=1, index=7)
    words = np.random.Philox(key=[5, 7], counter=[0, 0, 0, 1]).random_raw(64).tolist()
    expected = [(word >> 32) * 10 // 2**32 for word in reversed(words)]
    assert [dice.below(10) for _ in range(64)] == expected
    assert {dice.between(-2, 2) for _ in range(200)} == {-2, -1, 0, 1, 2}
    octets = dice.octets(300, 5, 3)
    assert octets.shape == (300, 5, 3) and octets.dtype == np.uint8
    assert abs(float(octets.mean()) - 127.5) < 5


def test_the_rotation_table_is_cosine_and_sine():
    dice = Dice(0, 0, 0)
    turns = np.array([dice.turn() for _ in range(500)]) / 2**14
    np.testing.assert_allclose(np.hypot(*turns.T), 1, atol=1e-4)
    slanted = np.array([dice.turn(TURN // 20) for _ in range(500)]) / 2**14
    assert slanted[:, 0].min() >= np.cos(2 * np.pi * 51 / 1024) - 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_covers_both_its_levels(pattern: str):
    y, x = np.mgrid[:64, :80].astype(np.int32)
    levels = PATTERNS[pattern](Dice(0, 0, 0), x * 16, y * 16, 80)
    assert levels.shape == (64, 80) and levels.dtype == np.uint8
    assert 0.1 < float((levels > 127).mean()) < 0.9


def nearest(images: np.ndarray, labels: np.ndarray, bank: int) -> float:
    """Top-1 of the nearest neighbour by Euclidean distance."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    squares = (flat[:bank] ** 2).sum(1)
    closest = (squares - 2 * flat[bank:] @ flat[:bank].T).argmin(1)
    return float((labels[closest] == labels[bank:]).mean())


def weighted_knn(images: np.ndarray, labels: np.ndarray, bank: int, centre: bool) -> float:
    """Top-1 of 20 neighbours by cosine, weighted by exp(cosine / 0.07), as for features."""
    unit = images.reshape(len(images), -1).astype(np.float32)
    if centre:
        unit = unit - unit.mean(1, keepdims=True)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit[bank:] @ unit[:bank].T
    near = np.argpartition(-cosine, 20, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(cosine, near, 1) / 0.07)
    votes = np.zeros((len(near), labels.max() + 1))
    np.add.at(votes, (np.arange(len(near))[:, None], labels[near]), weights)
    return float((votes.argmax(1) == labels[bank:]).mean())


def test_neighbours_in_pixels_and_colours_do_not_solve_the_classes():
    source = SyntheticScenes(split="val")
    records = [source.read(index) for index in range(2100)]
    labels = np.array([record.label for record in records])
    small = np.stack(
        [cv2.resize(np.asarray(r.data), (32, 32), interpolation=cv2.INTER_AREA) for r in records]
    )
    chance = 1 / 12
    assert weighted_knn(small, labels, 1500, centre=False) < 2 * chance
    assert nearest(small, labels, 1500) < 2.5 * chance
    # Without the brightness of the image more is left to see: upright stripes match each other.
    assert weighted_knn(small, labels, 1500, centre=True) < 3.5 * chance
    colours = np.stack([np.asarray(r.data).mean((0, 1)) for r in records])
    assert nearest(colours, labels, 1500) < 2 * chance


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="splits train and val, not 'test'"):
        SyntheticScenes(split="test")
    with pytest.raises(ValueError, match="length of at least 1, not 0"):
        SyntheticScenes(length=0)
    with pytest.raises(IndexError, match="there is no image 10"):
        SyntheticScenes(length=10).read(10)
