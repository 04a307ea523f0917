"""Encoded image to upright RGB pixels, from input that nobody has checked.

JPEG goes through simplejpeg (libjpeg-turbo, strict: damaged data is an error), everything else, and
any JPEG that it refuses, through Pillow. The pixel limit is checked against the header, before
anything is decoded: a file of some kilobytes can declare gigabytes (Pillow's own limit, 179 million
pixels, stays). torchvision's `decode_image` is not used: damaged PNG files crash the process there.

What becomes RGB how: EXIF orientation is applied; transparency is laid over white, as a web page
shows it; 16-bit values are scaled by 255/65535; wider integers and floats by their own range, or
floats within [0, 1] by 255; of an animation the first frame is taken; other modes as Pillow does.
A truncated file is an error.
"""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000

_ORIENTATION = 0x0112  # the EXIF tag
_JPEG_MODELS = ("YCbCr", "Gray", "RGB")  # CMYK and YCCK go through Pillow


class DecodeError(Exception):
    """This image cannot be used; the message is the reason."""


class Encoded:
    """An image whose header has been read and whose pixels have not.

    Attributes:
        width, height: size in pixels, upright (after EXIF orientation).

    Raises:
        DecodeError: not an image, a damaged header, or more than `max_pixels` pixels.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._data = data
        self._image: Image.Image | None = None
        self._orientation = 1
        self._max_pixels = max_pixels
        if not data:
            raise DecodeError("empty file")
        size = self._open_jpeg() if data[:2] == b"\xff\xd8" else None
        self.width, self.height = size or self._open_pillow()

    def decode(self) -> np.ndarray:
        """The pixels: uint8 RGB (height, width, 3), contiguous. DecodeError if damaged."""
        if self._image is None:
            try:
                pixels = simplejpeg.decode_jpeg(self._data, "RGB")
            except ValueError:
                # Pillow tolerates harmless faults (a broken colour profile, stray bytes).
                self._open_pillow()
            else:
                return np.ascontiguousarray(_upright(pixels, self._orientation))
        image = self._image
        assert image is not None
        try:
            with _QUIET:
                image.load()
                image = ImageOps.exif_transpose(image)
                pixels = _to_rgb(image)
        except Exception as error:  # Pillow's plugins raise almost anything on damaged data
            raise DecodeError(_reason(error)) from error
        return pixels

    def _open_jpeg(self) -> tuple[int, int] | None:
        """Upright size by simplejpeg, or None where Pillow has to do it."""
        try:
            header = simplejpeg.decode_jpeg_header(self._data)
        except ValueError:
            return None
        height, width, model = int(header[0]), int(header[1]), header[2]
        if model not in _JPEG_MODELS:
            return None
        self._check(width, height)
        # Pillow's header parser costs more than decoding a small image: call it only for EXIF.
        if self._data.find(b"Exif\0\0", 0, 65536) >= 0:
            try:
                with _QUIET, Image.open(io.BytesIO(self._data)) as image:
                    self._orientation = _orientation(image)
            except Exception:  # an unreadable EXIF block says nothing: leave the image as it is
                self._orientation = 1
        return (height, width) if self._orientation >= 5 else (width, height)

    def _open_pillow(self) -> tuple[int, int]:
        try:
            with _QUIET:
                image = Image.open(io.BytesIO(self._data))
                width, height = image.size
        except Exception as error:
            raise DecodeError(_reason(error)) from error
        self._check(width, height)
        if image.format == "EPS":
            raise DecodeError("EPS is a program: decoding it would run an interpreter")
        self._image = image
        # Pillow turns TIFF files by itself, and reports the size after it.
        swap = image.format != "TIFF" and _orientation(image) >= 5
        return (height, width) if swap else (width, height)

    def _check(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise DecodeError("no pixels")
        if width * height > self._max_pixels:
            raise DecodeError(
                f"{width}x{height} pixels, more than the limit of {self._max_pixels:,}"
            )


class _Quiet:
    """Pillow's warnings about damaged files, silenced: the ledger says what matters.

    `warnings.catch_warnings` is not safe across threads, so the filter is set under a lock and
    counted: it stands while any thread is inside.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._catch: warnings.catch_warnings | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._catch = warnings.catch_warnings()
                self._catch.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                assert self._catch is not None
                self._catch.__exit__(None, None, None)


_QUIET = _Quiet()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where it is absent, unreadable or invalid."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation (EXIF 2.3, tag 0x0112): 5 to 8 are stored transposed."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32) * (255 / 65535)
    elif image.mode in ("I", "F"):
        values = _to_byte_range(np.asarray(image).astype(np.float64))
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    return np.repeat((values + 0.5).astype(np.uint8)[:, :, None], 3, axis=2)


def _to_byte_range(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise DecodeError("pixel values that are not finite")
    if low >= 0 and high <= 1:
        return values * 255
    if low >= 0 and 255 < high <= 65535:
        return values * (255 / 65535)
    return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)


def _reason(error: Exception) -> str:
    """One line without the address of a Python object, so that the ledger is deterministic."""
    if isinstance(error, DecodeError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
