"""Images made on the spot, good and hostile ones, and the sets of the environment."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(seed: int, width: int, height: int) -> np.ndarray:
    """Smooth colour fields with edges and some noise: closer to a photo than white noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    top, left = rng.integers(0, height), rng.integers(0, width)
    pixels[top:, left:] = 255 - pixels[top:, left:]
    pixels += rng.integers(-12, 13, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _encode(pixels: np.ndarray, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture(scope="session")
def picture():
    return _picture


@pytest.fixture(scope="session")
def encode():
    return _encode


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = (30000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def hostile() -> dict[str, bytes]:
    """File name to content of files that must be skipped."""
    jpeg = _encode(_picture(900, 80, 60))
    return {
        "bomb.png": _bomb(),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
    }


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, hostile: dict[str, bytes]) -> Path:
    """A folder: classes a (7 images), b/deep (6), one image beside them, and the hostile files."""
    root = tmp_path_factory.mktemp("photos")
    for n in range(14):
        folder = root / ("a" if n < 7 else "b/deep" if n < 13 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        form, end = (("JPEG", "jpg"), ("PNG", "PNG"), ("WEBP", "webp"))[n % 3]
        pixels = _picture(n, 30 + 7 * n, 90 - 4 * n)
        (folder / f"{n:02d}.{end}").write_bytes(_encode(pixels, form))
    for name, content in hostile.items():
        (root / "b" / name).write_bytes(content)
    (root / "notes.txt").write_text("not an image")
    (root / "a" / ".hidden.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def sets() -> Path:
    """The folder of real image sets."""
    if "SELFSIGHT_DATA" not in os.environ:
        pytest.skip("needs the image sets: set SELFSIGHT_DATA to their folder")
    return Path(os.environ["SELFSIGHT_DATA"])
