"""Pillow, fenced in: few formats, limits before decoding, switches that hold for one thread only.

`FORMATS` names the formats that are opened. Left out are those that run a program (EPS), need a
handler of the system (WMF, HDF5, GRIB, BUFR), are no images for the web (FLI, FITS, MPEG, ...), or
are known to few; a camera's MPO is a JPEG. Formats that Pillow decodes in Python (some BMP and PPM)
may have `SLOW_PIXELS` pixels at most.
"""

from __future__ import annotations

import ctypes
import io
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps

from selfsight.data.decode_limits import DecodeError, DecodeLimits
from selfsight.data.pixels import strips

FORMATS = (
    "AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "TGA", "TIFF", "WEBP",
)  # fmt: skip
SLOW_PIXELS = 1_000_000  # about a second

_ORIENTATION = 0x0112  # the EXIF tag
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags


def _silence_libtiff() -> None:
    """Have libtiff print nothing about damaged files: Pillow has no switch for it, and raises what
    matters. It is the copy inside Pillow's wheel; another build of Pillow goes on printing."""
    place = Path(PIL.__file__).parent
    found = [*place.parent.glob("pillow.libs/libtiff*"), *place.glob(".dylibs/libtiff*")]
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
            for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
                getattr(library, name).argtypes = [ctypes.c_void_p]
                getattr(library, name)(None)
        except (OSError, AttributeError):
            continue


_silence_libtiff()


def open_image(data: bytes, limits: DecodeLimits, *, lenient: bool = False) -> Image.Image:
    """The image with its header read; DecodeError, or whatever Pillow raises on damaged data."""
    if data.startswith(_POSTSCRIPT):
        raise DecodeError("EPS is a program: decoding it would run an interpreter")
    if data.startswith(b"\0\0\1\0"):
        _check_icon(data, limits)
    with _QUIET, _Lenient(lenient):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    limits.check_size(width, height)
    tiles: list[ImageFile._Tile] = getattr(image, "tile", [])
    if width * height > SLOW_PIXELS and any(tile[0] in Image.DECODERS for tile in tiles):
        raise DecodeError(
            f"{width}x{height} pixels of a kind of {image.format} that decodes slowly, more than "
            f"the limit of {SLOW_PIXELS:,}"
        )
    if image.format == "TIFF":
        # libtiff reserves memory for a whole tile, however small the image is.
        tags = getattr(image, "tag_v2", {})
        tile_width, tile_length = tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1)
        if not isinstance(tile_width, int) or not isinstance(tile_length, int):
            raise DecodeError("TIFF tiles without a size")
        if tile_width * tile_length > max(4 * width * height, 1 << 20):
            raise DecodeError(f"tiles of {tile_width}x{tile_length} pixels in a smaller image")
    return image


def load(image: Image.Image, *, lenient: bool = False) -> Image.Image:
    """The decoded image, upright (after EXIF orientation). Raises what Pillow raises."""
    with _QUIET, _Lenient(lenient):
        image.load()
        return ImageOps.exif_transpose(image) if orientation(image) > 1 else image


def load_early(image: Image.Image, *, lenient: bool = False) -> bool:
    """Decode a PNG before its size is asked for: EXIF may follow the pixels.

    Gives False where the pixels end in damage, such as a wrong checksum, after which Pillow has
    some. Raises what Pillow raises where it has none or the file ends early.
    """
    if image.format != "PNG":
        return True
    try:
        with _QUIET, _Lenient(lenient):
            image.load()
    except Exception:
        if getattr(image, "tile", True):
            raise
        return False
    return True


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation."""
    width, height = image.size
    # Pillow turns TIFF files by itself, and reports the size after it.
    swap = image.format != "TIFF" and orientation(image) >= 5
    return (height, width) if swap else (width, height)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where it is absent, unreadable or invalid."""
    try:
        with _QUIET:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decoded_share(image: Image.Image, grey: bool) -> float:
    """About which share of the rows of a damaged, loaded image hold something.

    What is missing has one colour. It is libjpeg's `grey`, 128, or guessed: rows of the colour of
    the first or last pixel of a plain first or last row count as missing, so that a plain border is
    held against a damaged image.
    """
    if grey:
        if image.mode not in ("L", "RGB"):
            return 1.0
        fills = [np.full(len(image.getbands()), 128)]
    else:
        first = np.asarray(image.crop((0, 0, image.width, 1)))[0]
        last = np.asarray(image.crop((0, image.height - 1, image.width, image.height)))[0]
        fills = [first[0], last[0]]
    missing = 0
    for _, _, strip in strips(image):
        pixels = np.asarray(strip)
        rows = pixels.reshape(*pixels.shape[:2], -1)
        missing += int(
            np.logical_or.reduce([(rows == fill).all(axis=(1, 2)) for fill in fills]).sum()
        )
    return 1 - missing / image.height


def low_bytes(data: bytes, image: Image.Image, limits: DecodeLimits) -> Image.Image | None:
    """The same 16-bit RGB(A) image opened so that it decodes to the low bytes; None for others.

    Pillow keeps 16 bits of grey only and cuts colour to the high byte, which it finds by the byte
    order in the tile's raw mode. With the other byte order named it takes the low byte.
    """
    if image.mode not in ("RGB", "RGBA") or "transparency" in image.info:
        return None
    native = "L" if sys.byteorder == "little" else "B"
    low: ImageFile.ImageFile = open_image(data, limits)  # pyright: ignore[reportAssignmentType]
    tiles = []
    for tile in low.tile:
        raw = tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0]
        kind, _, order = str(raw).partition(";16")
        order = native if order == "N" else order
        if kind != image.mode or order not in ("L", "B"):
            return None
        swapped = f"{kind};16{'B' if order == 'L' else 'L'}"
        args = tile.args
        tiles.append(
            tile._replace(args=(swapped, *args[1:]) if isinstance(args, tuple) else swapped)
        )
    low.tile = tiles
    return low if tiles else None


def _check_icon(data: bytes, limits: DecodeLimits) -> None:
    """The sizes within an ICO file, which Pillow decodes on opening it."""
    for number in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * number : 22 + 16 * number]
        if len(entry) < 16:
            return
        start = int.from_bytes(entry[12:16], "little")
        head = data[start : start + 24]
        if head.startswith(b"\x89PNG"):
            size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        else:
            size = (
                int.from_bytes(head[4:8], "little"),
                abs(int.from_bytes(head[8:12], "little", signed=True)),
            )
        if len(head) == 24:
            limits.check_size(*size)


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


class _Switch(threading.local):
    """Stands for Pillow's LOAD_TRUNCATED_IMAGES, of which only the truth is asked.

    Within `_Lenient` it is that thread's; elsewhere what the program had set.
    """

    def __init__(self, outside: bool) -> None:
        self.outside = outside
        self.inside: bool | None = None

    def __bool__(self) -> bool:
        return self.outside if self.inside is None else self.inside


class _Lenient:
    """Within it Pillow uses truncated images, or does not, in this thread only."""

    def __init__(self, lenient: bool) -> None:
        self._lenient = lenient

    def __enter__(self) -> None:
        switch = ImageFile.LOAD_TRUNCATED_IMAGES
        if not isinstance(switch, _Switch):
            switch = _Switch(bool(switch))
            ImageFile.LOAD_TRUNCATED_IMAGES = switch  # pyright: ignore[reportAttributeAccessIssue]
        self._switch, self._before = switch, switch.inside
        switch.inside = self._lenient

    def __exit__(self, *exc: object) -> None:
        self._switch.inside = self._before
