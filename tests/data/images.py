"""Making and decoding images, for the tests of the decoder."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.data.decode import DecodeLimits, Encoded
from selfsight.data.pixels import RGB, PixelFormat


def decode(data: bytes, pixels: PixelFormat = RGB, **options) -> np.ndarray:
    image = Encoded(data, DecodeLimits(**options), pixels)
    decoded = image.decode()
    assert decoded.dtype == pixels.dtype and decoded.flags.c_contiguous
    assert decoded.shape == (image.height, image.width, pixels.channels)
    return decoded


def save(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels, allow_pickle=False)
    return file.getvalue()


def interlaced(image: Image.Image) -> bytes:
    """A PNG in Adam7 order, which Pillow reads and does not write."""
    pixels, raw = np.asarray(image), b""
    for x, y, dx, dy in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):  # fmt: skip
        rows = pixels[y::dy, x::dx]
        raw += b"".join(b"\0" + row.tobytes() for row in rows if row.size)
    size = struct.pack(">II", *image.size)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + bytes([8, 2, 0, 0, 1]))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def uncurated(sets: Path) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """Sample to (file name, content), and sample to what Pillow made of it."""
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
    return files, outcomes
