"""What a file holds, told by its bytes and not by its name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from selfsight.data import decode_pillow
from selfsight.data.decode import DecodeLimits

KINDS = ("grey", "palette", "CMYK", "16 bits or more", "transparency", "several frames", "rotated")

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
    (b"\x93NUMPY", "NPY"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
)
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body")
_HEIF = (b"heic", b"heix", b"heif", b"hevc", b"mif1", b"msf1")


class Content(NamedTuple):
    """What the header of a file says.

    Attributes:
        format: of the image, as Pillow names it, or what the file looks like: "HTML", "text",
            "empty", ...
        mode: of its pixels, as Pillow names it; "" where it is not known.
        kinds: those of `KINDS` that it is.
    """

    format: str
    mode: str = ""
    kinds: tuple[str, ...] = ()


def content(data: bytes | np.ndarray, limits: DecodeLimits) -> Content:
    """Look at an encoded image, or at pixels; nothing is decoded, and nothing is raised."""
    if isinstance(data, np.ndarray):
        channels = data.shape[2] if data.ndim == 3 else 1
        deep = ("16 bits or more",) if data.dtype.itemsize > 1 else ()
        mode = {1: "L", 3: "RGB"}.get(channels, f"{channels} channels")
        return Content("pixels", mode, (("grey",) if channels == 1 else ()) + deep)
    try:
        image = decode_pillow.open_image(data, limits)
    except Exception:  # Pillow's plugins raise almost anything on damaged data
        return Content(_looks_like(data))
    mode = image.mode
    raw = [str(tile.args) for tile in getattr(image, "tile", [])]
    found = {
        "grey": mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;"),
        "palette": mode in ("P", "PA"),
        "CMYK": mode == "CMYK",
        "16 bits or more": mode in ("I", "F")
        or mode.startswith("I;")
        or any(";16" in text for text in raw),
        "transparency": _asked(lambda: image.has_transparency_data),
        "several frames": _asked(lambda: getattr(image, "is_animated", False)),
        "rotated": decode_pillow.orientation(image) > 1,
    }
    return Content(image.format or "?", mode, tuple(kind for kind in KINDS if found[kind]))


def _asked(question) -> bool:
    """An answer of Pillow, or no where damage keeps it from one."""
    try:
        return bool(question())
    except Exception:
        return False


def _looks_like(data: bytes) -> str:
    """A word for a file that is not opened as an image."""
    if not data:
        return "empty"
    for start, word in _SIGNATURES:
        if data.startswith(start):
            return word
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "HEIC" if brand in _HEIF else "AVIF" if brand in (b"avif", b"avis") else "MP4"
    head = data[:512].lstrip().lower()
    if head.startswith(_MARKUP):
        return "HTML"
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"<?xml", b"<")):
        return "XML"
    if not any(byte < 32 and byte not in b"\t\n\r\f" for byte in data[:512]):
        return "text"
    return "unknown"
