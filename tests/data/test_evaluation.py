from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data.evaluation import read_images
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
