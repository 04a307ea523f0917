"""What a downloaded file is, by its first bytes: names and content types of the web often lie.

TGA has no signature, so such files are not told from others, and are refused.
"""

from __future__ import annotations

import re

ENOUGH = 64  # bytes that decide
_NETPBM = re.compile(rb"P([1-6fF])\s+[\d#]")
_NETPBM_ENDS = {b"1": "pbm", b"4": "pbm", b"2": "pgm", b"5": "pgm", b"f": "pfm", b"F": "pfm"}


def image_extension(head: bytes) -> str | None:
    """The usual extension of the image format that these first bytes open, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0\x08\0", b"MM\0+\0\x08")):
        return "tif"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:ENOUGH] or b"avis" in head[8:ENOUGH]):
        return "avif"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jp2"
    # "BM" alone begins many texts; the size of the second header is one of few.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (
        12,
        40,
        52,
        56,
        64,
        108,
        124,
    ):
        return "bmp"
    if head.startswith(b"8BPS\0\x01"):
        return "psd"
    if head.startswith(b"\0\0\x01\0") and head[4:5] not in (b"", b"\0") and head[9:10] == b"\0":
        return "ico"
    if match := _NETPBM.match(head):
        return _NETPBM_ENDS.get(match.group(1), "ppm")
    return None


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as the header declares them, for JPEG, PNG, GIF, WebP and BMP; else None."""
    kind = image_extension(data[:ENOUGH])
    size = None
    if kind == "png" and len(data) >= 24:
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif kind == "gif" and len(data) >= 10:
        size = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    elif kind == "bmp" and len(data) >= 26 and data[14] != 12:
        width, height = (int.from_bytes(data[p : p + 4], "little", signed=True) for p in (18, 22))
        size = width, abs(height)  # negative: rows from top to bottom
    elif kind == "webp":
        size = _webp_size(data)
    elif kind == "jpg":
        size = _jpeg_size(data)
    return size if size and size[0] > 0 and size[1] > 0 else None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if len(data) < 30:
        return None
    if chunk == b"VP8X":  # 24-bit sizes less one
        width, height = (int.from_bytes(data[p : p + 3], "little") + 1 for p in (24, 27))
    elif chunk == b"VP8L":  # 14-bit sizes less one, behind a signature byte
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":  # 14-bit sizes, behind frame tag and start code
        width, height = (int.from_bytes(data[p : p + 2], "little") & 0x3FFF for p in (26, 28))
    else:
        return None
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Sizes in the first frame header (SOF0 to SOF15 without DHT, JPG and DAC)."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[p : p + 2], "big") for p in (place + 5, place + 7))
            return width, height
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a body
            place += 2
        elif marker in (0xD9, 0xDA):
            return None
        else:
            place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
    return None
