"""Limits, and images that are damaged or cut."""

import io
import struct
import warnings
from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from selfsight.data import decode_pillow
from selfsight.data.crops import Box
from selfsight.data.decode import DecodeError, DecodeLimits, Encoded
from selfsight.data.pixels import RGB, PixelFormat
from tests.data.images import decode, off, save, uncurated


def test_pixel_limit_is_checked_against_the_header(picture, encode, hostile):
    with pytest.raises(DecodeError, match="900000000 pixels"):
        Encoded(hostile["bomb.png"])
    for form in ("JPEG", "PNG"):
        data = encode(picture(8, 50, 40), form)
        assert decode(data, max_pixels=2000).shape == (40, 50, 3)
        with pytest.raises(DecodeError, match="50x40 pixels, more than the limit of 1,999"):
            Encoded(data, DecodeLimits(max_pixels=1999))


def test_limits_of_bytes_and_sides(picture, encode):
    data = encode(picture(0, 80, 20), "PNG")
    assert decode(data, max_bytes=len(data), max_side=80).shape == (20, 80, 3)
    with pytest.raises(DecodeError, match=r"bytes, more than the limit of \d+"):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(DecodeError, match="80x20 pixels, a side longer than the limit of 79"):
        decode(data, max_side=79)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "max_pixels must be at least 1, but it is 0"),
        ({"max_bytes": -1}, "max_bytes must be at least 1"),
        ({"truncated": "maybe"}, "truncated must be skip or use, but it is maybe"),
        ({"min_decoded": 1.5}, "min_decoded must be a share from 0 to 1"),
    ],
)
def test_mistakes_in_limits_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeLimits(**options)


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1), (1, 1), (60000, 2)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_strips_are_used(size, form):
    width, height = (min(side, 65500) if form == "JPEG" else side for side in size)  # its most
    pixels = np.arange(width * height, dtype=np.uint32).astype(np.uint8).reshape(height, width)
    data = save(Image.fromarray(pixels), form)
    for reduction in (1, 8):
        image = Encoded(data)
        decoded = image.decode(reduction)
        box = image.place(Box(0, 0, height, width))
        assert (box.height, box.width) == decoded.shape[:2]
    assert decode(data).shape == (height, width, 3)


def test_a_progressive_jpeg_of_very_many_scans_is_refused(picture):
    data = save(Image.fromarray(picture(0, 200, 200)), "JPEG", progressive=True)
    assert decode(data).shape == (200, 200, 3)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + (data[last:-2]) * 3000 + data[-2:]
    with pytest.raises(DecodeError, match=r"scans of 40,000 pixels: too much work"):
        decode(many, max_pixels=1_000_000)
    # A stray byte between the markers sends it to Pillow, which counts too.
    with pytest.raises(DecodeError, match="too much work"):
        decode(many[:2] + b"\xff\xfe\0\4ab\0" + many[2:], max_pixels=1_000_000)


def test_an_icon_cannot_hide_a_large_image(hostile):
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0])
    content = hostile["bomb.png"]
    entry += len(content).to_bytes(4, "little") + (22).to_bytes(4, "little")
    with pytest.raises(DecodeError, match="30000x30000 pixels, more than the limit"):
        decode(b"\0\0\1\0\1\0" + entry + content)


def test_tiff_tiles_larger_than_the_image_are_refused():
    for side, used in ((64, True), (60000, False)):
        tags = {256: 20, 257: 20, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side}
        tags |= {324: 8 + 2 + 12 * 10 + 4, 325: 64 * 64}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        if used:
            assert (decode(header + b"\7" * 64 * 64) == 7).all()
            continue
        for form in (RGB, PixelFormat(5)):
            with pytest.raises(DecodeError, match="tiles of 60000x60000 pixels in a smaller image"):
                decode(header + b"\7" * 64 * 64, form)


def test_what_pillow_decodes_in_python_has_a_lower_limit(monkeypatch):
    plain = b"P2 20 10 255\n" + b"7 " * 200
    assert (decode(plain) == 7).all()
    monkeypatch.setattr(decode_pillow, "SLOW_PIXELS", 199)
    with pytest.raises(DecodeError, match="20x10 pixels of a kind of PPM that decodes slowly"):
        decode(plain)
    assert decode(b"P5 20 10 255\n" + bytes(200)).shape == (10, 20, 3)


@pytest.mark.parametrize("form", ["PCX", "SGI", "ICNS", "DDS", "XBM"])
def test_formats_not_in_the_list_are_refused(picture, form):
    image = Image.fromarray(picture(0, 64, 64))
    data = save(image.convert("1") if form == "XBM" else image, form)
    with pytest.raises(DecodeError, match="not an image in a known format"):
        decode(data)


# ------------------------------------------------------------------------- damaged images


def test_truncated_images_are_used_where_asked(picture, encode):
    for form in ("JPEG", "PNG", "GIF", "TIFF", "BMP"):
        data = encode(picture(7, 100, 80), form)
        whole = decode(data)
        share = (np.array([0.9, 0.3]) * len(data)).astype(int)
        used = decode(data[: share[0]], truncated="use")
        same = (np.abs(used.astype(int) - whole) < 3).all(axis=(1, 2)).mean()
        assert 0.6 < same < 1, (form, same)
        with pytest.raises(DecodeError, match=r"damaged: about \d+\.\d% of its rows"):
            decode(data[: share[1]], truncated="use")
        assert decode(data[: share[1]], truncated="use", min_decoded=0).shape == whole.shape
        with pytest.raises(DecodeError):
            decode(data[:12], truncated="use", min_decoded=0)


def test_the_policy_holds_for_its_thread_only(picture, encode):
    """Threads of both policies side by side, while the program's own setting stays what it is."""
    data = encode(picture(7, 100, 80), "PNG")
    cut = data[: int(len(data) * 0.9)]
    wrong: list[str] = []

    def work(policy: str) -> None:
        for _ in range(60):
            try:
                decode(cut, truncated=policy)
                used = True
            except DecodeError:
                used = False
            if used != (policy == "use") or bool(ImageFile.LOAD_TRUNCATED_IMAGES) != outside:
                wrong.append(policy)

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        for outside in (False, True):
            ImageFile.LOAD_TRUNCATED_IMAGES = outside
            threads = [Thread(target=work, args=(p,)) for p in ("skip", "use") * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with Image.open(io.BytesIO(cut)) as image:
                if outside:
                    image.load()
                else:
                    with pytest.raises(OSError, match="truncated"):
                        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    assert wrong == []


def test_damage_that_pillow_passes_over_is_measured(picture, encode):
    """A JPEG with its end marker and half of its data, a PNG with a wrong checksum."""
    jpeg = encode(picture(7, 100, 96))
    with pytest.raises(DecodeError, match=r"damaged: about \d+\.\d% of its rows"):
        decode(jpeg[: len(jpeg) // 3] + b"\xff\xd9")
    assert decode(jpeg[: len(jpeg) * 9 // 10] + b"\xff\xd9").shape == (96, 100, 3)
    pixels = picture(7, 100, 96)
    png = encode(pixels, "PNG")
    for share in (0.05, 0.3, 0.6, 0.9):
        at = int(share * len(png))
        spoiled = png[:at] + b"\xff" * 40 + png[at + 40 :]
        if share < 0.5:
            with pytest.raises(DecodeError, match=r"damaged: about \d+\.\d% of its rows"):
                decode(spoiled)
            continue
        same = (decode(spoiled) == pixels).all(axis=(1, 2)).mean()
        assert abs(same - share) < 0.05
    with pytest.raises(DecodeError, match="damaged"):
        decode(png[:2000] + b"\xff" * 40 + png[2040:], PixelFormat(3, 16))


def test_the_truncated_files_of_the_uncurated_set(sets):
    """All are used by the other policy, as Pillow does, but for one format and two sizes."""
    files, outcomes = uncurated(sets)
    refused = {}
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    for sample, (name, data) in files.items():
        if outcomes[sample] == "ok":
            continue
        try:
            pixels = decode(data, truncated="use", min_decoded=0)
        except DecodeError as error:
            if outcomes[sample] == "truncated":
                refused[name] = str(error)
            continue
        assert outcomes[sample] == "truncated", name
        try:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
                expected = ImageOps.exif_transpose(image).convert("RGB")
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        if image.mode == "RGB":
            assert off(pixels, np.asarray(expected)) < 1, name
    assert sorted(refused) == ["000131.bmp", "000148.fli"], refused
    assert "3158064x48 pixels, more than the limit" in refused["000131.bmp"]
