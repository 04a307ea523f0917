"""Encoded image to upright pixels, from input that nobody has checked.

JPEG goes through simplejpeg (libjpeg-turbo, strict: damaged data is an error), everything else, and
any JPEG that it refuses, through Pillow, in the formats of `decode_pillow.FORMATS`. All limits are
checked against the bytes and the header, before anything is decoded: a file of some kilobytes can
declare gigabytes. torchvision's `decode_image` is not used: damaged PNG files crash the process
there.

EXIF orientation is applied; of an animation the first frame is taken; colours and depths become
what `pixels.PixelFormat` asks for. A truncated file is an error unless the limits say otherwise.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for less work (other fractions are slower than
the whole). Its pixel (x, y) is then at (x / n, y / n), to a fraction of a pixel that `place` knows.
"""

from __future__ import annotations

from math import floor
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from selfsight.data import decode_multiband, decode_pillow
from selfsight.data.crops import Box
from selfsight.data.decode_limits import MAX_PIXELS, DecodeError, DecodeLimits, describe
from selfsight.data.pixels import RGB, PixelFormat, from_array, from_halves, from_image

__all__ = ["MAX_PIXELS", "DecodeError", "DecodeLimits", "Encoded"]

_JPEG_MODELS = ("YCbCr", "Gray", "RGB")  # CMYK and YCCK go through Pillow
_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)  # EXIF orientations, after transposing
_SCAN_PIXELS = 10  # times the pixel limit: progressive scans times pixels, a few seconds of work


class Encoded:
    """An image whose header has been read and whose pixels have not.

    Attributes:
        width, height: size in pixels, upright (after EXIF orientation).
        reduction: by which the pixels that `decode` returned are smaller, 1, 2, 4 or 8.

    Raises:
        DecodeError: not an image, a damaged header, or beyond the limits.
    """

    def __init__(
        self,
        data: bytes,
        limits: DecodeLimits | None = None,
        pixels: PixelFormat = RGB,
    ) -> None:
        self._data = data
        self._limits = limits = limits or DecodeLimits()
        self._format = pixels
        self._orientation = 1
        self._jpeg = False
        self._image: Image.Image | decode_multiband.Npy | decode_multiband.Tiff | None = None
        self._lenient = False
        self._faulty = False  # damage that Pillow passes over: some pixels may be missing
        self.reduction = 1
        if not data:
            raise DecodeError("empty file")
        if len(data) > limits.max_bytes:
            raise DecodeError(f"{len(data):,} bytes, more than the limit of {limits.max_bytes:,}")
        size = self._open_jpeg() if data[:2] == b"\xff\xd8" else None
        self.width, self.height = size or self._open_other()

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels: uint8 or uint16 (height, width, C), contiguous. DecodeError if damaged.

        `reduction` 2, 4 or 8 gives them smaller by that, sides rounded up, where the image allows
        it; the attribute says what it was.
        """
        if self._jpeg:
            pixels = self._decode_jpeg(reduction)
            if pixels is not None:
                return pixels
            # Pillow tolerates harmless faults (a broken colour profile, stray bytes).
            size = self._open_other()
        else:
            size = (self.width, self.height)
        try:
            pixels = self._decode_other()
        except Exception as error:  # Pillow's plugins raise almost anything on damaged data
            if self._limits.truncated != "use" or self._lenient:
                raise DecodeError(describe(error)) from error
            pixels = self._salvage(error)
        actual = (pixels.shape[1], pixels.shape[0])
        if not size == actual == (self.width, self.height):
            raise DecodeError(
                f"the header says {self.width}x{self.height}, the pixels are "
                f"{actual[0]}x{actual[1]}"
            )
        return pixels

    def place(self, box: Box) -> Box:
        """A box of the upright image in the pixels that `decode` returned.

        Edges are rounded to the nearest pixel, halves up, so that a box of n * reduction pixels
        keeps at least n.
        """
        n = self.reduction
        if n == 1:
            return box
        width, height = self._reduced()
        # The last pixel of a reduced image may reach beyond the edge; mirrored, it is the first.
        x = width - self.width / n if self._orientation in _MIRRORED_X else 0.0
        y = height - self.height / n if self._orientation in _MIRRORED_Y else 0.0
        left, right = floor(box.left / n + x + 0.5), floor((box.left + box.width) / n + x + 0.5)
        top, bottom = floor(box.top / n + y + 0.5), floor((box.top + box.height) / n + y + 0.5)
        right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
        left, top = min(left, right - 1), min(top, bottom - 1)
        return Box(top, left, bottom - top, right - left)

    # ------------------------------------------------------------- JPEG by simplejpeg

    def _open_jpeg(self) -> tuple[int, int] | None:
        """Upright size by simplejpeg, or None where Pillow has to do it."""
        try:
            header = simplejpeg.decode_jpeg_header(self._data)
        except ValueError:
            return None
        height, width, model = int(header[0]), int(header[1]), header[2]
        self._limits.check_size(width, height)
        self._check_scans(width * height)
        if model not in _JPEG_MODELS or self._format.channels not in (1, 3):
            return None
        # Pillow's header parser costs more than decoding a small image: call it only for EXIF.
        if self._data.find(b"Exif\0\0", 0, 65536) >= 0:
            try:
                with decode_pillow.open_image(self._data, self._limits) as image:
                    self._orientation = decode_pillow.orientation(image)
            except Exception:  # an unreadable EXIF block says nothing: leave the image as it is
                self._orientation = 1
        self._jpeg = True
        return (height, width) if self._orientation >= 5 else (width, height)

    def _check_scans(self, pixels: int) -> None:
        """A progressive JPEG is decoded once a scan, and a scan can be a few bytes."""
        data, at = self._data, 2
        while data[at : at + 1] == b"\xff":
            kind = data[at + 1] if at + 1 < len(data) else 0
            if kind in (0xC0, 0xC1):  # the common case: a baseline image
                return
            if kind in (0xC2, 0xCA, 0xDA):
                break
            at += 1 if kind == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        scans = data.count(b"\xff\xda")
        if scans * pixels > _SCAN_PIXELS * self._limits.max_pixels:
            raise DecodeError(f"{scans:,} scans of {pixels:,} pixels: too much work")

    def _decode_jpeg(self, reduction: int) -> np.ndarray | None:
        """The pixels by simplejpeg, or None where it refuses the image."""
        width, height = self.width, self.height
        if self._orientation >= 5:
            width, height = height, width
        least: dict[str, Any] = {}
        if reduction > 1:  # libjpeg takes the smallest size that is no smaller than this
            least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        space = "RGB" if self._format.channels == 3 else "GRAY"
        try:
            pixels = simplejpeg.decode_jpeg(self._data, space, **least)
        except ValueError:
            self._jpeg, self._faulty = False, True
            return None
        self.reduction = reduction
        pixels = from_array(_upright(pixels, self._orientation), self._format)
        assert pixels.shape[1::-1] == self._reduced(), (pixels.shape, self._reduced())
        return np.ascontiguousarray(pixels)

    def _reduced(self) -> tuple[int, int]:
        """Width and height of what `decode` returned."""
        return -(-self.width // self.reduction), -(-self.height // self.reduction)

    # ------------------------------------------------------------- everything else

    def _open_other(self) -> tuple[int, int]:
        """Upright size by Pillow, or by the readers of many channels."""
        many = self._format.channels not in (1, 3) and self._data[:4] in decode_multiband.TIFF
        try:
            if self._data.startswith(decode_multiband.NPY):
                self._image = decode_multiband.Npy(self._data, self._limits)
            elif many:
                self._image = decode_multiband.Tiff(self._data, self._limits)
                self._orientation = self._image.orientation
            else:
                return self._open_pillow()
        except Exception as error:
            raise DecodeError(describe(error)) from error
        return self._image.width, self._image.height

    def _open_pillow(self) -> tuple[int, int]:
        try:
            return self._open_with(lenient=False)
        except DecodeError:
            raise
        except Exception as error:
            if self._limits.truncated != "use":
                raise
            try:
                return self._open_with(lenient=True)
            except DecodeError:
                raise
            except Exception:
                raise error from None  # the reason is that of the plain attempt

    def _open_with(self, lenient: bool) -> tuple[int, int]:
        image = decode_pillow.open_image(self._data, self._limits, lenient=lenient)
        if image.format in ("JPEG", "MPO"):
            self._check_scans(image.width * image.height)
        self._image, self._lenient = image, lenient
        self._faulty |= not decode_pillow.load_early(image, lenient=lenient)
        return decode_pillow.upright_size(image)

    def _decode_other(self) -> np.ndarray:
        image = self._image
        if isinstance(image, Image.Image):
            low = None
            if self._format.bits == 16 and not self._lenient and not self._faulty:
                low = decode_pillow.low_bytes(self._data, image, self._limits)
            upright = decode_pillow.load(image, lenient=self._lenient)
            if low is not None:
                return from_halves(upright, decode_pillow.load(low), self._format)
            if self._lenient or self._faulty:
                grey = image.format in ("JPEG", "MPO") and not self._lenient
                share = decode_pillow.decoded_share(upright, grey)
                if share < self._limits.min_decoded:
                    raise DecodeError(
                        f"damaged: about {share:.1%} of its rows could be decoded, less than "
                        f"{self._limits.min_decoded:.1%}"
                    )
            return from_image(upright, self._format)
        assert image is not None
        pixels = from_array(image.decode(), self._format)
        return np.ascontiguousarray(_upright(pixels, self._orientation))

    def _salvage(self, error: Exception) -> np.ndarray:
        """What Pillow makes of a damaged image; DecodeError with the first `error` if nothing."""
        if not isinstance(self._image, Image.Image) or isinstance(error, DecodeError):
            raise DecodeError(describe(error)) from error
        try:
            self._open_with(lenient=True)
            return self._decode_other()
        except DecodeError:
            raise
        except Exception:
            raise DecodeError(describe(error)) from error


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation (EXIF 2.3, tag 0x0112): 5 to 8 are stored transposed."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _MIRRORED_X:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORED_Y:
        pixels = pixels[::-1]
    return pixels
