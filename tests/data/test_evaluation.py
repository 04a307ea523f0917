from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data.decode import DecodeLimits
from selfsight.data.evaluation import read_images
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.folder import ImageFolder

tv: Any = functional  # its annotations name tensors only; it takes Pillow images too


def test_images_are_resized_and_cropped_as_torchvision_does(tmp_path, picture):
    sizes = [(300, 200), (200, 310), (256, 256)]
    for n, (width, height) in enumerate(sizes):
        Image.fromarray(picture(n, width, height)).save(tmp_path / f"{n}.png")
    images, labels, skipped = read_images(ImageFolder(str(tmp_path)), [2, 0, 1], size=112)
    assert images.shape == (3, 3, 112, 112) and images.dtype == torch.uint8
    assert labels.tolist() == [-1, -1, -1] and skipped == []
    for image, n in zip(images, [2, 0, 1], strict=True):
        with Image.open(tmp_path / f"{n}.png") as pil:
            expected = np.asarray(tv.center_crop(tv.resize(pil, 128), [112, 112]))
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(float) - expected)
        # the long side may round differently by one pixel
        assert difference.mean() < 1.0


def test_small_images_are_not_enlarged_beyond_need(tmp_path, picture):
    pixels = picture(3, 32, 32)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, _, _ = read_images(ImageFolder(str(tmp_path)), [0], size=32)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    assert read_images(ImageFolder(str(tmp_path)), [0], size=48)[0].shape == (1, 3, 48, 48)


def test_bad_samples_are_reported_and_threads_change_nothing(photos, hostile):
    source = ImageFolder(str(photos), labels="folders")
    everything = range(len(source))
    images, labels, skipped = read_images(source, everything, size=24, resize=30)
    assert {f.key.split("/")[-1] for f in skipped} == set(hostile)
    assert len(images) == len(labels) == len(source) - len(hostile) == 14
    assert sorted(labels.tolist()) == [-1] + [0] * 7 + [1] * 6
    again = read_images(source, everything, size=24, resize=30, workers=3)
    assert torch.equal(again[0], images) and torch.equal(again[1], labels) and again[2] == skipped


def test_resize_below_the_crop_is_refused(photos):
    with pytest.raises(ValueError, match="cannot crop 24 pixels from images resized to 20"):
        read_images(ImageFolder(str(photos)), [0], size=24, resize=20)


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1), (9000, 3), (100, 2000)])
def test_strips_cost_no_more_than_their_middle(tmp_path, size):
    """Resized as a whole, the first would take 11 GB."""
    ramp = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[1], size[0])
    pixels = (ramp * 255 // ramp.max()).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, _, skipped = read_images(ImageFolder(str(tmp_path)), [0], size=64)
    assert images.shape == (1, 3, 64, 64) and skipped == []
    middle = float(pixels[size[1] // 2, size[0] // 2])
    assert abs(float(images.float().mean()) - middle) < 2


def test_formats_and_limits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 40), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    source = ImageFolder(str(tmp_path))
    images, _, _ = read_images(source, [0], size=40, resize=40, pixels=PixelFormat(1, 16))
    assert images.dtype == torch.uint16 and images.shape == (1, 1, 40, 40)
    assert np.array_equal(images[0, 0].numpy(), deep)
    images, _, skipped = read_images(source, [0], size=40, limits=DecodeLimits(max_pixels=1599))
    assert len(images) == 0 and "more than the limit of 1,599" in skipped[0].reason
