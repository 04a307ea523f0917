"""Files are told by their bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from selfsight.data.decode import DecodeLimits
from selfsight.inspection.content import content


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (12, 8), (200, 30, 90)).convert(mode)


def deep() -> bytes:
    return encoded(Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 600), "PNG")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(plain(), "JPEG", exif=exif)


def moving() -> bytes:
    frames = [Image.new("RGB", (12, 8), (n, 0, 0)) for n in (0, 99, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "form", "mode", "kinds"),
    [
        (encoded(plain(), "JPEG"), "JPEG", "RGB", ()),
        (encoded(plain("L"), "JPEG"), "JPEG", "L", ("grey",)),
        (encoded(plain("CMYK"), "JPEG"), "JPEG", "CMYK", ("CMYK",)),
        (turned(), "JPEG", "RGB", ("rotated",)),
        (encoded(plain("RGBA"), "PNG"), "PNG", "RGBA", ("transparency",)),
        (encoded(plain("P"), "PNG"), "PNG", "P", ("palette",)),
        (encoded(plain("1"), "PNG"), "PNG", "1", ("grey",)),
        (deep(), "PNG", "I;16", ("grey", "16 bits or more")),
        (moving(), "GIF", None, ("several frames",)),
        (encoded(plain(), "WEBP"), "WEBP", "RGB", ()),
        (np.zeros((4, 4, 3), np.uint8), "pixels", "RGB", ()),
        (np.zeros((4, 4, 1), np.uint16), "pixels", "L", ("grey", "16 bits or more")),
        (np.zeros((4, 4, 7), np.uint8), "pixels", "7 channels", ()),
    ],
)
def test_images(data, form, mode, kinds):
    found = content(data, DecodeLimits())
    assert found.format == form
    if mode is not None:
        assert found.mode == mode
    assert set(kinds) <= set(found.kinds)
    assert mode is None or found.kinds == kinds


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"  <!DOCTYPE html><html>404</html>", "HTML"),
        (b'<?xml version="1.0"?><svg xmlns="..."/>', "SVG"),
        (b"<?xml version='1.0'?><feed/>", "XML"),
        (b"Not found\n", "text"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0" + bytes(40), "MP4"),
        (b"\xff\xd8\xff\xe0 and no more", "JPEG"),
        (b"\x89PNG\r\n\x1a\n and no more", "PNG"),
        (bytes(range(64)), "unknown"),
    ],
)
def test_what_is_no_image(data, word):
    assert content(data, DecodeLimits()).format == word
    assert content(data, DecodeLimits()).kinds == ()


def test_an_image_beyond_the_limits_is_named_by_its_signature():
    assert content(encoded(plain(), "PNG"), DecodeLimits(max_pixels=10)).format == "PNG"
