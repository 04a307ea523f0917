import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from selfsight.data.crops import (
    BOX_DRAWS,
    Box,
    evaluation_geometry,
    planes,
    random_box,
    resize,
)
from selfsight.data.rng import hash64, uniforms

RATIO = (3 / 4, 4 / 3)


def boxes(count: int, width: int, height: int, scale, ratio=RATIO) -> np.ndarray:
    draws = uniforms(np.array([hash64(n) for n in range(count)], dtype=np.uint64), BOX_DRAWS)
    return np.array([random_box(u, width, height, scale, ratio) for u in draws.tolist()])


def torchvision_boxes(count: int, width: int, height: int, scale, ratio=RATIO) -> np.ndarray:
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = RandomResizedCrop.get_params
        return np.array([crop(image, list(scale), list(ratio)) for _ in range(count)])


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(500, 375, (0.14, 1.0)), (500, 375, (0.05, 0.14)), (32, 32, (0.25, 1.0)), (90, 300, (0.4, 1))],
)
def test_boxes_have_torchvisions_distribution(width, height, scale):
    n = 3000
    ours = boxes(n, width, height, scale)
    theirs = torchvision_boxes(n, width, height, scale)
    top, left, h, w = ours.T
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()

    def figures(b: np.ndarray) -> list[np.ndarray]:
        top, left, h, w = b.T.astype(float)
        return [h * w, w / h, top, left, top + h / 2]

    for a, b in zip(figures(ours), figures(theirs), strict=True):
        values = np.unique(np.concatenate([a, b]))
        cdf_a = np.searchsorted(np.sort(a), values, side="right") / n
        cdf_b = np.searchsorted(np.sort(b), values, side="right") / n
        # Two-sample Kolmogorov-Smirnov, 0.1 % point.
        assert np.abs(cdf_a - cdf_b).max() < 1.95 * np.sqrt(2 / n)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (997, 31), (2400, 3)])
def test_fallback_is_torchvisions_central_crop(width, height):
    ours = boxes(5, width, height, (0.9, 1.0))
    assert np.array_equal(ours, torchvision_boxes(5, width, height, (0.9, 1.0)))
    assert (ours == ours[0]).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 65535), (65535, 1), (2, 1)])
def test_the_smallest_images_have_boxes(width, height):
    for top, left, h, w in boxes(50, width, height, (0.05, 0.14)):
        assert 0 < h <= height - top and 0 < w <= width - left and top >= 0 and left >= 0


@pytest.mark.parametrize(
    ("size", "interpolation"), [(224, "bilinear"), (96, "bicubic"), (40, "bilinear")]
)
def test_resize_is_pillows(picture, size, interpolation):
    pixels = picture(1, 320, 240)
    box = Box(11, 30, 200, 170)
    out = np.empty((size, size, 3), np.uint8)
    resize(planes(pixels[None]), box, planes(out[None]), interpolation)
    crop = Image.fromarray(pixels).crop((30, 11, 200, 211))
    filter_ = getattr(Image.Resampling, interpolation.upper())
    expected = np.asarray(crop.resize((size, size), filter_)).astype(int)
    assert np.abs(out - expected).mean() < 0.2
    assert np.abs(out - expected).max() <= 2


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_of_any_number_of_channels_and_16_bits(channels, interpolation):
    """Each channel as Pillow resizes it in floats."""
    rng = np.random.default_rng(channels)
    pixels = rng.integers(0, 65536, (90, 120, channels), dtype=np.uint16)
    small = (pixels >> 8).astype(np.uint8)
    filter_ = getattr(Image.Resampling, interpolation.upper())
    for source, tolerance in ((pixels, 0.55), (small, 2)):
        out = np.zeros((1, 33, 21, channels), source.dtype)
        resize(planes(source[None]), Box(3, 5, 80, 100), planes(out), interpolation)
        for c in range(channels):
            plane = Image.fromarray(source[3:83, 5:105, c].astype(np.float32))
            expected = np.asarray(plane.resize((21, 33), filter_))
            expected = expected.clip(0, np.iinfo(source.dtype).max)
            assert np.abs(out[0, :, :, c] - expected).max() <= tolerance


def test_resize_writes_in_place_into_strided_slots(picture):
    memory = np.zeros((2, 5, 16, 16, 3), np.uint8)  # (count, b, s, s, 3), sample 3
    source = planes(picture(2, 60, 50)[None])
    for target in planes(memory[:, 3]).split(1):
        resize(source, Box(0, 0, 50, 60), target)
    assert memory[:, 3].any() and np.array_equal(memory[0, 3], memory[1, 3])
    assert not memory[:, [0, 1, 2, 4]].any()


def test_evaluation_geometry():
    assert evaluation_geometry(500, 375, 224, 256) == ((256, 341), (16, 58))
    assert evaluation_geometry(375, 500, 224, 256) == ((341, 256), (58, 16))
    assert evaluation_geometry(32, 32, 32, 37) == ((32, 32), (0, 0))  # left as it is
    assert evaluation_geometry(240, 300, 224, 256) == ((300, 240), (38, 8))  # large enough
    assert evaluation_geometry(20, 40, 32, 37) == ((64, 32), (16, 0))  # enlarged to the need
