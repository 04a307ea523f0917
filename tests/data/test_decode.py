import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from selfsight.data.crops import Box, planes, resize
from selfsight.data.decode import DecodeError, Encoded
from tests.data.images import decode, interlaced, off, save, uncurated

JPEG_1X1 = save(Image.new("L", (1, 1)), "JPEG")


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


def test_interlaced_animated_and_ycck(picture):
    image, other = (Image.fromarray(picture(n, 64, 48)) for n in (0, 1))
    assert np.array_equal(decode(interlaced(image)), np.asarray(image))
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = save(image, form, save_all=True, append_images=[other], **options)
        assert np.array_equal(decode(data), np.asarray(image))
    ycck = bytearray(save(image.convert("CMYK"), "JPEG", quality=98))
    ycck[ycck.index(b"Adobe") + 11] = 2  # the transform: the planes are YCC and K
    with Image.open(io.BytesIO(bytes(ycck))) as stored:
        assert stored.mode == "CMYK"
        assert np.array_equal(decode(bytes(ycck)), np.asarray(stored.convert("RGB")))


def test_wrong_extensions_mean_nothing(picture, encode):
    """Only bytes are given: the content alone decides."""
    for form in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert decode(encode(picture(0, 20, 10), form)).shape == (10, 20, 3)


def test_the_uncurated_set(sets):
    """Every file that Pillow opens becomes RGB, every other is refused with a reason."""
    files, outcomes = uncurated(sets)
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


# ------------------------------------------------------------------------- reduced size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_reduced_decoding_shows_the_same_boxes(picture, orientation, options):
    """Crops of the reduced image against crops of the whole one, at the same place.

    The edges of these boxes need no rounding; the size of the image is no multiple of 8.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = picture(3, 403, 301)
    smooth = Image.fromarray(pixels).resize((403, 301), Image.Resampling.BICUBIC)
    data = save(smooth, "JPEG", quality=95, exif=exif, **options)
    whole = decode(data)
    for reduction in (2, 4, 8):
        image = Encoded(data)
        reduced = image.decode(reduction)
        size = -(-image.height // reduction), -(-image.width // reduction)
        assert image.reduction == reduction and reduced.shape == (*size, 3)
        top = image.height % 8 if orientation in (3, 4, 7, 8) else 0  # where a mirrored grid starts
        left = image.width % 8 if orientation in (2, 3, 6, 7) else 0
        for box in (
            Box(top, left, 256, 256),
            Box(top + 40, left + 24, 128, 192),
            Box(top + 16, left, 64, 64),
        ):
            at = image.place(box)
            assert (at.height, at.width) == (box.height // reduction, box.width // reduction)
            a, b = np.empty((2, 8, 8, 3), np.uint8)
            resize(planes(whole[None]), box, planes(a[None]))
            resize(planes(reduced[None]), at, planes(b[None]))
            error = off(a, b)
            assert error < 1.5, (reduction, box, error)
            for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):  # nowhere is a better place
                moved = Box(at.top + down, at.left + right, at.height, at.width)
                y, x = moved.top + moved.height, moved.left + moved.width
                if min(moved) >= 0 and y <= size[0] and x <= size[1]:
                    resize(planes(reduced[None]), moved, planes(b[None]))
                    assert off(a, b) > error


def test_boxes_in_reduced_images():
    """Rounded to the nearest pixel, inside, and no smaller than asked for."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(n) for n in rng.integers(1, 400, 2))
        image = Encoded(JPEG_1X1)
        image.height, image.width = height, width
        image.reduction = reduction = int(rng.choice((2, 4, 8)))
        image._orientation = int(rng.integers(1, 9))
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        box = Box(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
        top, left, small_h, small_w = image.place(box)
        assert top >= 0 and left >= 0 and small_h > 0 and small_w > 0
        assert top + small_h <= -(-height // reduction)
        assert left + small_w <= -(-width // reduction)
        assert small_h >= h // reduction and small_w >= w // reduction
        assert abs(small_h - h / reduction) <= 1 and abs(small_w - w / reduction) <= 1
        for start, size, of, whole, mirrored in (
            (top, small_h, box.top + h / 2, height, image._orientation in (3, 4, 7, 8)),
            (left, small_w, box.left + w / 2, width, image._orientation in (2, 3, 6, 7)),
        ):
            moved = -(-whole // reduction) - whole / reduction if mirrored else 0
            assert abs(start + size / 2 - of / reduction - moved) <= 1


def test_other_formats_are_not_reduced(picture, encode):
    for form in ("PNG", "WEBP"):
        image = Encoded(encode(picture(1, 64, 64), form))
        assert image.decode(4).shape == (64, 64, 3) and image.reduction == 1
    image = Encoded(save(Image.fromarray(picture(1, 64, 64)).convert("CMYK"), "JPEG"))
    assert image.decode(4).shape == (64, 64, 3) and image.reduction == 1
    assert image.place(Box(1, 2, 3, 4)) == Box(1, 2, 3, 4)
