"""Each operation against torchvision's on a Pillow image."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data import photometric

tv: Any = functional  # its annotations name tensors only; it takes Pillow images too


@pytest.fixture(scope="module", params=[32, 224])
def image(request, picture) -> np.ndarray:
    return picture(request.param, request.param, request.param)


def error(image: np.ndarray, operation, expected: Image.Image) -> float:
    pixels = image.copy()
    operation(pixels)
    return float(np.abs(pixels.astype(float) - np.asarray(expected).astype(float)).mean())


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.7, 1.0, 1.3, 1.8])
def test_brightness_contrast_saturation(image, factor):
    pil = Image.fromarray(image)
    for ours, theirs in (
        (photometric.brightness, tv.adjust_brightness),
        (photometric.contrast, tv.adjust_contrast),
        (photometric.saturation, tv.adjust_saturation),
    ):
        assert error(image, lambda p, f=ours: f(p, factor), theirs(pil, factor)) < 0.5
    if factor == 1.0:
        for operation in (photometric.brightness, photometric.contrast, photometric.saturation):
            assert error(image, lambda p, f=operation: f(p, 1.0), pil) == 0


@pytest.mark.parametrize("shift", [-0.2, -0.05, 0.0, 0.1, 0.2, 0.5])
def test_hue(image, shift):
    assert (
        error(
            image, lambda p: photometric.hue(p, shift), tv.adjust_hue(Image.fromarray(image), shift)
        )
        < 1.0
    )


def test_gray_solarize_flip(image):
    pil = Image.fromarray(image)
    assert error(image, photometric.gray, tv.rgb_to_grayscale(pil, 3)) < 0.1
    assert error(image, photometric.solarize, tv.solarize(pil, 128)) == 0
    assert error(image, photometric.flip, tv.hflip(pil)) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian(image, sigma):
    width = 2 * int(np.ceil(5 * sigma)) + 1
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = tv.gaussian_blur(tensor, [width, width], [sigma, sigma])[0].permute(1, 2, 0)
    pixels = image.copy()
    photometric.blur(pixels, sigma)
    difference = np.abs(pixels - expected.numpy())
    assert difference.mean() < 0.5 and difference.max() < 3


def test_clamping_after_each_operation():
    """Twice as bright, then half: what was clamped stays lost, as in the recipe."""
    pixels = np.full((8, 8, 3), 200, np.uint8)
    photometric.brightness(pixels, 2.0)
    photometric.brightness(pixels, 0.5)
    assert (pixels == 127).all()


def test_a_whole_jitter_in_any_order(image):
    names = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    factors = [1.4, 0.6, 1.5, -0.12]
    rng = np.random.default_rng(0)
    for _ in range(6):
        order = rng.permutation(4)
        pixels, pil = image.copy(), Image.fromarray(image)
        for n in order:
            photometric.JITTER[n](pixels, factors[n])
            pil = names[n](pil, factors[n])
        assert np.abs(pixels.astype(float) - np.asarray(pil).astype(float)).mean() < 1.5
