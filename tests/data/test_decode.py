import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from selfsight.data.decode import DecodeError, Encoded


def decode(data: bytes, **options: int) -> np.ndarray:
    image = Encoded(data, **options)
    pixels = image.decode()
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape == (image.height, image.width, 3)
    return pixels


def save(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_formats(picture, encode, form):
    pixels = picture(0, 61, 47)
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(pixels, form, **options)
    assert off(decode(data), pixels) <= {"GIF": 12, "JPEG": 12}.get(form, 0)
    if form == "JPEG":
        with Image.open(io.BytesIO(data)) as image:
            assert off(decode(data), np.asarray(image)) < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_exif_orientation_is_applied(picture, form, orientation):
    image = Image.fromarray(picture(1, 64, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(image, form, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    pixels = decode(data)
    assert pixels.shape == ((64, 40, 3) if 5 <= orientation <= 8 else (40, 64, 3))
    assert off(pixels, expected) < 1


def test_grey_one_bit_and_palette(picture):
    image = Image.fromarray(picture(2, 50, 40))
    for mode in ("L", "1", "P"):
        stored = image.convert(mode)
        assert np.array_equal(decode(save(stored, "PNG")), np.asarray(stored.convert("RGB")))
    grey = decode(save(image.convert("L"), "JPEG"))
    assert (grey[:, :, 0] == grey[:, :, 1]).all() and (grey[:, :, 0] == grey[:, :, 2]).all()


def test_cmyk_and_16_bit(picture):
    image = Image.fromarray(picture(3, 50, 40))
    assert off(decode(save(image.convert("CMYK"), "JPEG", quality=98)), np.asarray(image)) < 6
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for form in ("PNG", "TIFF"):
        pixels = decode(save(Image.fromarray(ramp), form))
        assert np.array_equal(pixels[:, :, 1].ravel(), np.arange(256))
    floats = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.array_equal(decode(save(floats, "TIFF"))[:, :, 2].ravel(), np.arange(256))
    wide = Image.fromarray(np.linspace(-9e6, 9e6, 256).astype(np.int32).reshape(16, 16))
    assert np.array_equal(decode(save(wide, "TIFF"))[:, :, 0].ravel(), np.arange(256))
    broken = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    with pytest.raises(DecodeError, match="not finite"):
        decode(save(broken, "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(picture, mode):
    image = Image.fromarray(picture(4, 40, 40)).convert(mode)
    alpha = np.zeros((40, 40), np.uint8)
    alpha[:, 20:] = 255
    alpha[:10, 20:] = 128
    image.putalpha(Image.fromarray(alpha))
    pixels = decode(save(image, "PNG")).astype(int)
    opaque = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[:, :20] == 255).all()
    assert np.array_equal(pixels[10:, 20:], opaque[10:, 20:])
    assert np.abs(pixels[:10, 20:] - (opaque[:10, 20:] + 255) / 2).max() <= 2


def test_first_frame_of_an_animation(picture):
    frames = [Image.fromarray(picture(n, 30, 30)).quantize(32) for n in (5, 6)]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert off(decode(data), np.asarray(frames[0].convert("RGB"))) < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_is_an_error(picture, encode, form):
    data = encode(picture(7, 100, 80), form)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            decode(data[: int(len(data) * share)])


def test_what_is_no_image(hostile):
    with pytest.raises(DecodeError, match="empty file"):
        decode(b"")
    for data in (hostile["page.jpg"], b"\xff\xd8", b"\xff\xd8\xff\xe0" + bytes(100), bytes(500)):
        with pytest.raises(DecodeError):
            decode(data)


def test_postscript_is_not_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(DecodeError, match="EPS is a program"):
        decode(eps)


def test_pixel_limit_is_checked_against_the_header(picture, encode, hostile):
    with pytest.raises(DecodeError, match="900000000 pixels"):
        Encoded(hostile["bomb.png"])
    for form in ("JPEG", "PNG"):
        data = encode(picture(8, 50, 40), form)
        assert decode(data, max_pixels=2000).shape == (40, 50, 3)
        with pytest.raises(DecodeError, match="50x40 pixels, more than the limit of 1,999"):
            Encoded(data, max_pixels=1999)


def test_a_jpeg_with_a_harmless_fault_is_used(picture, encode):
    data = encode(picture(9, 50, 40))
    end = 4 + int.from_bytes(data[4:6], "big")  # of the first segment
    spoiled = data[:end] + b"\x00" + data[end:]  # a stray byte between markers
    assert off(decode(spoiled), decode(data)) < 1


def test_damaged_input_never_raises_anything_else(picture, encode):
    rng = np.random.default_rng(0)
    used = 0
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encode(picture(10, 40, 30), form)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(0, 256)
            try:
                decode(bytes(damaged))
                used += 1
            except DecodeError as error:
                assert str(error) and "\n" not in str(error) and "0x" not in str(error)
    assert 0 < used < 360


def test_the_uncurated_set(sets):
    """Every file that Pillow opens becomes RGB, every other is refused with a reason."""
    files, outcomes = {}, {}
    with tarfile.open(sets / "uncurated" / "uncurated-000000.tar") as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            sample = member.name.split(".")[0]
            if member.name.endswith(".json"):
                outcomes[sample] = json.loads(content.read())["outcome"]
            else:
                files[sample] = (member.name, content.read())
    assert len(files) == len(outcomes) == 335
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sample, (name, data) in files.items():
            try:
                decode(data)
                ok = True
            except DecodeError as error:
                assert str(error)
                ok = False
            if ok != (outcomes[sample] == "ok"):
                wrong.append((name, outcomes[sample]))
    assert wrong == []
