import numpy as np
import pytest
from PIL import Image

from selfsight.data.decode import DecodeLimits
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.folder import ImageFolder
from selfsight.data.sources.source import Record, Source
from selfsight.data.statistics import pixel_statistics


class Arrays(Source):
    """Arrays of pixels, one a sample."""

    name = "arrays"

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, index: int) -> Record:
        return Record(str(index), self.arrays[index])


def test_means_and_deviations_are_those_of_all_pixels():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 200, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    seen = pixel_statistics(Arrays(arrays), 100)
    values = np.stack(arrays).reshape(-1, 3) / 255
    assert seen.images == 20 and seen.failures == []
    np.testing.assert_allclose(seen.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(seen.std, values.std(axis=0), rtol=1e-10)


@pytest.mark.parametrize(("channels", "bits"), [(1, 16), (5, 8), (4, 16)])
def test_other_formats(channels, bits):
    form = PixelFormat(channels, bits)
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, form.top, (16, 20, channels)).astype(form.dtype) for _ in range(5)]
    seen = pixel_statistics(Arrays(arrays), pixels=form)
    values = np.stack(arrays)[:, :, 2:18].reshape(-1, channels) / form.top  # the central squares
    np.testing.assert_allclose(seen.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(seen.std, values.std(axis=0), rtol=1e-10)


def test_large_images_count_as_much_as_small_ones():
    dark, light = np.zeros((400, 900, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    seen = pixel_statistics(Arrays([dark, light]), size=64)
    assert seen.mean == (0.5, 0.5, 0.5) and seen.std == (0.5, 0.5, 0.5)
    large = np.full((1000, 700, 3), 51, np.uint8)
    seen = pixel_statistics(Arrays([large]), size=64)
    np.testing.assert_allclose(seen.mean, [0.2] * 3, rtol=1e-12)
    np.testing.assert_allclose(seen.std, [0] * 3, atol=1e-8)


def test_a_sample_is_always_the_same_and_bad_files_are_counted(photos, hostile):
    source = ImageFolder(str(photos))
    everything = pixel_statistics(source, 1000)
    assert everything == pixel_statistics(source, 1000)
    assert everything.images == len(source) - len(hostile) == 14
    assert {f.key.split("/")[-1] for f in everything.failures} == set(hostile)
    some = pixel_statistics(source, 6)
    assert some == pixel_statistics(source, 6) and some.images + len(some.failures) == 6
    assert max(abs(a - b) for a, b in zip(some.mean, everything.mean, strict=True)) < 0.3


def test_nothing_usable_is_an_error(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    source = ImageFolder(str(tmp_path))
    with pytest.raises(ValueError, match=r"none of 1 images can be used, the last of them a\.png"):
        pixel_statistics(source, limits=DecodeLimits(max_pixels=100))
    with pytest.raises(ValueError, match="none of 0 images can be used"):
        pixel_statistics(Arrays([]))


def test_real_images(data_folder):
    """Near the figures that everybody normalises ImageNet with."""
    from selfsight.data.sources.shards import TarShards

    seen = pixel_statistics(TarShards(f"{data_folder}/imagenet_sample/all-000000.tar"), 56)
    assert seen.images == 56
    np.testing.assert_allclose(seen.mean, (0.485, 0.456, 0.406), atol=0.06)
    np.testing.assert_allclose(seen.std, (0.229, 0.224, 0.225), atol=0.07)
