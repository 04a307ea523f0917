"""Images of which everything is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inspection.small import encoded, noise


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 noisy images of two classes (four of them turned, three copies), two black ones, one plain
    white one, and seven that cannot be used."""
    root = tmp_path_factory.mktemp("pictures") / "<b>odd & name"
    for n in range(30):
        place = root / ("cats" if n < 20 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if n < 4:
            exif[0x0112] = 6
        data = encoded(noise(min(n, 26), 40, 20), "JPEG", exif=exif)
        (place / f"{n:02d}.png").write_bytes(data)  # the extension is wrong
    for n, value in enumerate((0, 5, 255)):
        flat = np.full((48, 48, 3), value, np.uint8)
        flat[0, 0, 0] = n
        (root / "dogs" / f"flat{n}.png").write_bytes(encoded(flat))
    torn = encoded(noise(1, 30, 30))
    for n in range(3):
        (root / "dogs" / f"torn{n}.png").write_bytes(torn[: 600 + 10 * n])
    for n in range(2):
        (root / "dogs" / f"page{n}.jpg").write_text(f"<html>{n}</html>")
    (root / "dogs" / "empty.jpg").write_bytes(b"")
    (root / "dogs" / "large.png").write_bytes(encoded(noise(2, 200, 100)))
    return root
