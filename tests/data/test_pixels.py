"""Channels and bits other than those of RGB."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from selfsight.data import pixels as pixels_module
from selfsight.data.decode import DecodeError
from selfsight.data.pixels import PixelFormat
from tests.data.images import decode, npy, off, save


def test_grey_from_anything(picture, encode):
    image = Image.fromarray(picture(2, 50, 40))
    grey = np.asarray(image.convert("L"))[:, :, None]
    one = PixelFormat(1)
    assert np.array_equal(decode(save(image, "PNG"), one), grey)
    assert np.array_equal(decode(save(image.convert("L"), "PNG"), one), grey)
    assert off(decode(save(image, "JPEG", quality=98), one), grey) < 2
    assert off(decode(save(image.convert("CMYK"), "JPEG", quality=98), one), grey) < 4
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(decode(save(Image.fromarray(ramp), "PNG"), one).ravel(), np.arange(256))
    clear = image.convert("LA")
    clear.putalpha(0)
    assert (decode(save(clear, "PNG"), one) == 255).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_kept(form):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (20, 30), dtype=np.uint16)
    data = save(Image.fromarray(grey), form)
    assert np.array_equal(decode(data, PixelFormat(1, 16))[:, :, 0], grey)
    assert np.array_equal(decode(data, PixelFormat(3, 16))[:, :, 1], grey)
    colour = rng.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 5] if form == "TIFF" else []
    data = cv2.imencode(f".{form.lower()}", colour[:, :, ::-1], options)[1].tobytes()
    assert np.array_equal(decode(data, PixelFormat(3, 16)), colour)
    assert off(decode(data, PixelFormat(1, 16))[:, :, 0], colour @ [0.299, 0.587, 0.114]) < 1
    assert off(decode(data), colour / 257) < 0.6
    alpha = colour[:, :, :1].copy()
    data = cv2.imencode(".png", np.concatenate([colour[:, :, ::-1], alpha], 2))[1].tobytes()
    share = alpha / 65535
    assert off(decode(data, PixelFormat(3, 16)), colour * share + 65535 * (1 - share)) < 1
    assert np.array_equal(decode(data, PixelFormat(4, 16)), np.concatenate([colour, alpha], 2))


def test_8_bits_become_16(picture, encode):
    pixels = picture(0, 40, 30)
    deep = decode(encode(pixels, "PNG"), PixelFormat(3, 16))
    assert np.array_equal(deep, pixels.astype(np.uint16) * 257)
    floats = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    values = decode(save(floats, "TIFF"), PixelFormat(1, 16))
    assert np.array_equal(values.ravel(), np.arange(256) * 257)


def test_images_of_many_channels(picture):
    rng = np.random.default_rng(1)
    for channels, dtype in ((5, np.uint8), (7, np.uint16), (2, np.uint16)):
        pixels = rng.integers(0, np.iinfo(dtype).max, (20, 30, channels), dtype=dtype)
        form = PixelFormat(channels, 8 * pixels.itemsize)
        files = [npy(pixels), npy(pixels.astype(pixels.dtype.newbyteorder(">")))]
        for data in files:
            assert np.array_equal(decode(data, form), pixels)
            with pytest.raises(DecodeError, match=f"{channels} channels, where 3 are wanted"):
                decode(data)
            with pytest.raises(DecodeError, match="too few bytes"):
                decode(data[:-1], form)
            with pytest.raises(DecodeError, match="30x20 pixels, more than the limit of 599"):
                decode(data, form, max_pixels=599)
    four = Image.fromarray(picture(0, 30, 20)).convert("RGBA")
    assert np.array_equal(decode(save(four, "PNG"), PixelFormat(4)), np.asarray(four))
    with pytest.raises(DecodeError, match="3 channels, where 4 channels are wanted"):
        decode(save(four.convert("RGB"), "PNG"), PixelFormat(4))
    with pytest.raises(DecodeError, match="3 channels, where 4 channels are wanted"):
        decode(save(four.convert("RGB"), "JPEG"), PixelFormat(4))
    assert np.array_equal(decode(npy(picture(0, 9, 8))), picture(0, 9, 8))


def test_npy_files_that_are_no_images():
    executed = np.array([{"a": 1}], dtype=object)
    file = io.BytesIO()
    np.save(file, executed, allow_pickle=True)
    for data, message in (
        (file.getvalue(), "not .height, width."),
        (npy(np.zeros((3, 4, 5), np.float32)), "of float32"),
        (npy(np.asfortranarray(np.zeros((3, 4, 5), np.uint8))), "Fortran order"),
        (npy(np.zeros((0, 4), np.uint8)), "no pixels"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "EOF|header"),
    ):
        with pytest.raises(DecodeError, match=message):
            decode(data, PixelFormat(5))


def test_tiff_of_many_channels():
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed: extra multiband")
    pixels = np.random.default_rng(2).integers(0, 65536, (40, 50, 6), dtype=np.uint16)
    form = PixelFormat(6, 16)
    for options in (
        {},
        {"compression": "zlib", "predictor": True},
        {"planarconfig": "separate"},
        {"tile": (16, 16)},
    ):
        file = io.BytesIO()
        stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
        tifffile.imwrite(
            file, stored, photometric="minisblack", **({"planarconfig": "contig"} | options)
        )
        data = file.getvalue()
        assert np.array_equal(decode(data, form), pixels), options
        with pytest.raises(DecodeError):
            decode(data[: len(data) - 2000], form)
        with pytest.raises(DecodeError, match="50x40 pixels, more than the limit"):
            decode(data, form, max_pixels=100)
        with pytest.raises(DecodeError, match="6 channels, where 5 are wanted"):
            decode(data, PixelFormat(5, 16))
    file = io.BytesIO()
    tags = [(274, "H", 1, 6, True)]
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig", extratags=tags)
    turned = decode(file.getvalue(), form)
    assert np.array_equal(turned, np.rot90(pixels, -1))


def test_large_images_are_converted_in_strips(picture, monkeypatch):
    image = Image.fromarray(picture(0, 60, 90))
    palette = image.quantize(64)
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    files = [save(image, "PNG"), save(palette, "PNG", transparency=7), save(alpha, "PNG")]
    whole = [decode(data) for data in files]
    monkeypatch.setattr(pixels_module, "_STRIP", 60 * 7)
    assert all(np.array_equal(decode(d), w) for d, w in zip(files, whole, strict=True))


@pytest.mark.parametrize(("channels", "bits"), [(0, 8), (600, 8), (3, 12)])
def test_mistakes_in_formats_are_named(channels, bits):
    with pytest.raises(ValueError, match=r"pixels: (channels|bits) must be"):
        PixelFormat(channels, bits)
