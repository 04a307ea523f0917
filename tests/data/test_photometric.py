"""Each operation against torchvision's on a Pillow image."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from selfsight.data import photometric
from selfsight.data.pixels import PixelFormat

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


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_16_bit_operations_are_finer_8_bit_ones(channels):
    """On values that 8 bits hold, they agree to the cut to whole levels of the 8-bit ones."""
    rng = np.random.default_rng(channels)
    coarse = rng.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    pixels = cv2.resize(coarse, (48, 40), interpolation=cv2.INTER_CUBIC)
    pixels = pixels.reshape(40, 48, channels)
    small = photometric.operations(PixelFormat(channels, 8))
    deep = photometric.operations(PixelFormat(channels, 16))
    colour = channels == 3
    cases = [
        (small.jitter[n], deep.jitter[n], value)
        for n in range(4 if colour else 2)
        for value in ((0.3, 1.0, 1.7) if n < 3 else (-0.2, 0.1))
    ]
    cases += [(small.blur, deep.blur, 0.3), (small.blur, deep.blur, 2.0)]
    cases += [(small.solarize, deep.solarize, None), (small.flip, deep.flip, None)]
    if colour:
        cases += [(small.gray, deep.gray, None)]
    for of_8, of_16, value in cases:
        a, b = pixels.copy(), pixels.astype(np.uint16) * 257
        arguments = () if value is None else (value,)
        of_8(a, *arguments)
        of_16(b, *arguments)
        assert b.dtype == np.uint16 and a.shape == b.shape == pixels.shape
        difference = np.abs(b / 257 - a.astype(float))
        hue_ = colour and of_8 is photometric.hue  # 8-bit hue has 256 angles only
        assert difference.mean() < (1.5 if hue_ else 0.9), (of_8, value, difference.mean())
        assert difference.max() < (10 if hue_ else 2.0), (of_8, value, difference.max())


def test_operations_by_their_definition():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (20, 30, 5), dtype=np.uint16)
    operations = photometric.operations(PixelFormat(5, 16))
    values = pixels.astype(np.float64)
    for operation, expected in (
        (lambda p: operations.jitter[0](p, 1.5), values * 1.5),
        (lambda p: operations.jitter[1](p, 0.4), values * 0.4 + values.mean() * 0.6),
        (lambda p: operations.jitter[1](p, 1.8), values * 1.8 - values.mean() * 0.8),
        (operations.solarize, np.where(values < 32768, values, 65535 - values)),
        (operations.flip, values[:, ::-1]),
    ):
        result = pixels.copy()
        operation(result)
        assert np.abs(result - np.clip(expected, 0, 65535)).max() <= 0.52
    small = (pixels >> 8).astype(np.uint8)
    operations = photometric.operations(PixelFormat(5, 8))
    result = small.copy()
    operations.jitter[1](result, 0.4)
    expected = small * 0.4 + round(small.mean()) * 0.6
    assert np.abs(result - np.floor(expected)).max() <= 1
    operations.solarize(result := small.copy())
    assert np.array_equal(result, np.where(small < 128, small, 255 - small))


def test_colour_operations_need_colours():
    pixels = np.zeros((4, 4, 2), np.uint8)
    operations = photometric.operations(PixelFormat(2, 8))
    for operation in (*operations.jitter[2:],):
        with pytest.raises(TypeError, match="images of 2 channels have no colour"):
            operation(pixels, 0.5)
    with pytest.raises(TypeError, match="images of 2 channels have no colour"):
        operations.gray(pixels)
