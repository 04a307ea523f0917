"""Images of any number of channels, which Pillow cannot hold: `.npy` arrays, and TIFF by tifffile.

A `.npy` file may hold (height, width) or (height, width, channels) of uint8 or uint16, in C order,
and is used whatever number of channels is wanted. tifffile (extra `multiband`) reads the first page
of a TIFF; compressions other than none, deflate and packbits need what it needs for them.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from selfsight.data.decode_limits import DecodeError, DecodeLimits

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Npy:
    """A `.npy` file with its header read. DecodeError, or what numpy raises on a damaged header."""

    def __init__(self, data: bytes, limits: DecodeLimits) -> None:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file)
        else:
            raise DecodeError(f".npy of version {version[0]}.{version[1]}, not 1.0 or 2.0")
        self._data, self._start = data, file.tell()
        self._shape, self._dtype = header[0], np.dtype(header[2])
        if header[1] or len(self._shape) not in (2, 3) or self._dtype.kind != "u":
            order = "Fortran" if header[1] else "C"
            raise DecodeError(
                f".npy of {self._dtype}, shape {self._shape}, {order} order: not (height, width) "
                "or (height, width, channels) of uint8 or uint16 in C order"
            )
        self.height, self.width = self._shape[0], self._shape[1]
        limits.check_size(self.width, self.height)
        if math.prod(self._shape) * self._dtype.itemsize > len(data) - self._start:
            raise DecodeError(f".npy of shape {self._shape} with too few bytes")

    def decode(self) -> np.ndarray:
        """The array as it is, in native byte order."""
        count = math.prod(self._shape)
        flat = np.frombuffer(self._data, self._dtype, count, self._start)
        return flat.reshape(self._shape).astype(self._dtype.newbyteorder("="))


class Tiff:
    """The first page of a TIFF with its header read. DecodeError, or what tifffile raises."""

    def __init__(self, data: bytes, limits: DecodeLimits) -> None:
        try:
            import tifffile  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DecodeError(
                "a TIFF of many channels needs tifffile: uv sync --extra multiband"
            ) from None
        self._file: Any = tifffile.TiffFile(io.BytesIO(data))
        page: Any = self._file.pages[0]
        width, height = int(page.imagewidth), int(page.imagelength)
        limits.check_size(width, height)
        bands = math.prod(page.shape) // (width * height)
        if page.axes not in ("YX", "YXS", "SYX") or bands > 512:
            raise DecodeError(f"a TIFF of axes {page.axes} and shape {page.shape}")
        if page.is_tiled and int(page.tilewidth) * int(page.tilelength) > max(
            4 * width * height, 1 << 20
        ):
            raise DecodeError(
                f"tiles of {page.tilewidth}x{page.tilelength} pixels in a smaller image"
            )
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        if not page.dataoffsets or any(not n or start + n > len(data) for start, n in ends):
            raise DecodeError("TIFF strips beyond the end of the file")
        tag = page.tags.get(274)
        turn = tag.value if tag is not None else 1
        self.orientation = int(turn) if turn in range(1, 9) else 1
        self.width, self.height = (height, width) if self.orientation >= 5 else (width, height)
        self._page = page

    def decode(self) -> np.ndarray:
        """The stored pixels (H, W, C), not yet upright."""
        pixels = self._page.asarray(maxworkers=1)
        if self._page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        if self._page.photometric == 0:  # white is zero
            pixels = np.iinfo(pixels.dtype).max - pixels
        return pixels
