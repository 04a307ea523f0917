"""Thousands of damaged images, decoded in a child process: a crash there names its seed here.

`python tests/data/test_hostile.py FIRST COUNT FILE` is that child.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFile

from selfsight.data.decode import DecodeError, DecodeLimits
from selfsight.data.multicrop import CropGroup, MultiCrop
from selfsight.data.pixels import PixelFormat
from tests.data.images import interlaced

MUTATIONS = 10_000
SECONDS = 2.0
MEGABYTES = 200

# ------------------------------------------------------------------------- images


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-9, 10, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def corpus() -> dict[str, bytes]:
    """Good images of the five formats, in many of their kinds; most of them 64 pixels wide."""
    images: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, form: str, **options: object) -> None:
        file = io.BytesIO()
        image.save(file, form, **options)  # type: ignore[arg-type]
        images[f"{name}.{form.lower()}"] = file.getvalue()

    small, large = picture(0, 64, 48), picture(1, 300, 220)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    clear = small.copy()
    clear.putalpha(small.convert("L"))
    more = [picture(n, 64, 48) for n in (2, 3)]
    palette = [image.quantize(32) for image in (small, *more)]
    save("plain", small, "JPEG", quality=80)
    save("large", large, "JPEG", quality=70)
    save("progressive", small, "JPEG", progressive=True)
    save("large_progressive", large, "JPEG", progressive=True, quality=60)
    save("fine", small, "JPEG", subsampling=0, restart_marker_blocks=4)
    save("turned", small, "JPEG", exif=exif)
    save("grey", small.convert("L"), "JPEG")
    save("cmyk", small.convert("CMYK"), "JPEG")
    save("plain", small, "PNG")
    save("large", large, "PNG")
    save("palette", palette[0], "PNG", transparency=3)
    save("deep", deep, "PNG")
    save("clear", clear, "PNG", exif=exif)
    save("bits", small.convert("1"), "PNG")
    save("animated", small, "PNG", save_all=True, append_images=more)
    images["interlaced.png"] = interlaced(small)
    for end in ("png", "tiff"):
        colour = np.asarray(small).astype(np.uint16) * 257
        images[f"deep_colour.{end}"] = cv2.imencode(f".{end}", colour)[1].tobytes()
    save("plain", small, "WEBP")
    save("large", large, "WEBP", quality=50)
    save("lossless", small, "WEBP", lossless=True)
    save("clear", clear, "WEBP", exif=exif)
    save("animated", small, "WEBP", save_all=True, append_images=more)
    save("plain", palette[0], "GIF")
    save("animated", palette[0], "GIF", save_all=True, append_images=palette[1:])
    save("clear", palette[0], "GIF", transparency=2)
    for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        save(kind, small, "TIFF", compression=kind)
    save("fax", small.convert("1"), "TIFF", compression="group4")
    save("deep", deep, "TIFF", exif=exif)
    save("cmyk", small.convert("CMYK"), "TIFF", compression="tiff_lzw")
    save("pages", small, "TIFF", save_all=True, append_images=more)
    return images


# ------------------------------------------------------------------------- damage

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damage(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A damaged copy: one to three of byte flips, cuts, splices, edits of headers and lengths."""
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        kind = int(rng.integers(8))
        spoiled = bytearray(data)
        at = int(rng.integers(len(data)))
        if kind == 0:  # flips anywhere
            for place in rng.integers(0, len(data), int(rng.integers(1, 17))):
                spoiled[place] = int(rng.integers(256))
        elif kind == 1:  # flips in the header
            for place in rng.integers(0, min(len(data), 96), int(rng.integers(1, 5))):
                spoiled[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # a cut
            del spoiled[at:]
        elif kind == 3:  # a hole, or the same part twice
            end = min(len(data), at + int(rng.integers(1, 400)))
            spoiled[at:end] = bytes(spoiled[at:end]) * int(rng.integers(0, 3))
        elif kind == 4:  # a part of another image
            start = int(rng.integers(len(other)))
            part = other[start : start + int(rng.integers(1, 600))]
            spoiled[at : at + int(rng.integers(0, len(part) + 1))] = part
        elif kind == 5:  # a run of one value
            run = bytes([int(rng.choice((0, 255, 127, int(rng.integers(256)))))])
            spoiled[at : at + int(rng.integers(0, 50))] = run * int(rng.integers(1, 200))
        elif kind == 6:  # a length field
            at = int(rng.integers(min(len(data), 600)))
            size = int(rng.choice((1, 2, 4)))
            value = EXTREMES[int(rng.integers(len(EXTREMES)))] & ((1 << 8 * size) - 1)
            order = "big" if rng.integers(2) else "little"
            spoiled[at : at + size] = value.to_bytes(size, order)
        else:  # a size of the image, small enough to pass the limits
            at = int(rng.integers(min(len(data), 40)))
            value = int(rng.integers(1, 9000))
            spoiled[at : at + 2] = value.to_bytes(2, "big" if rng.integers(2) else "little")
        data = bytes(spoiled)
    if data.startswith(b"\x89PNG") and rng.integers(4):
        data = with_checksums(data)  # so that more than the checksums is tested
    return data


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG whose chunks have right checksums, as far as their lengths lead."""
    spoiled, at = bytearray(data), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            break
        spoiled[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(spoiled)


# ------------------------------------------------------------------------- tests


def test_ten_thousand_damaged_images(tmp_path: Path) -> None:
    """No crash, none that takes 2 s, memory within bounds, and good images are used after."""
    progress = tmp_path / "seed"
    environment = dict(os.environ, PYTHONPATH="ssl:.", OMP_NUM_THREADS="1")
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, here, "0", str(MUTATIONS), progress],
        cwd=here.parents[2], env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    seed = progress.read_text() if progress.exists() else "before the first"
    assert done.returncode == 0, (seed, done.returncode, done.stderr[-2000:])
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["slowest"][0] < SECONDS, seen
    assert seen["megabytes"] < MEGABYTES, seen
    assert 1000 < seen["used"] < MUTATIONS - 1000, seen
    assert seen["reasons"] > 50, seen  # much more than the header was damaged
    assert not seen["switch"]


# ------------------------------------------------------------------------- the child


def child(first: int, count: int, progress: Path) -> None:
    """Decode `count` damaged images from seed `first` on; the last line tells what was seen."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    images = corpus()
    names = list(images)
    crops = MultiCrop({"g": CropGroup(16, 1, (0.05, 0.5))})
    grey = MultiCrop(
        {"g": CropGroup(16, 1, (0.2, 1.0), jitter_strengths=(0.4, 0.4, 0, 0), gray=0)},
        pixels=PixelFormat(1, 16),
    )
    salvage = DecodeLimits(truncated="use")

    def one(seed: int, data: bytes) -> tuple[bool, str]:
        """Whether it could be used, and the reason if not."""
        multicrop = grey if seed % 5 == 4 else crops
        outs = [np.empty(shape, multicrop.dtype) for shape in multicrop.shapes(1)]
        limits = salvage if seed % 3 == 2 else DecodeLimits()
        try:
            multicrop(data, [o[:, 0] for o in outs], seed=0, epoch=0, key=str(seed), limits=limits)
        except DecodeError as error:
            return False, str(error)
        return True, ""

    def check_good() -> None:
        for place, name in enumerate(names):
            for seed in range(15):
                used, reason = one(seed, images[name])
                assert used, (place, name, seed, reason)

    check_good()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used, slowest, reasons = 0, (0.0, -1), set()
    with progress.open("wb", buffering=0) as file:
        for seed in range(first, first + count):
            os.pwrite(file.fileno(), f"{seed:10d}".encode(), 0)
            rng = np.random.default_rng(seed)
            name, other = (names[int(n)] for n in rng.integers(0, len(names), 2))
            data = damage(rng, images[name], images[other])
            start = time.thread_time()
            good, reason = one(seed, data)
            slowest = max(slowest, (time.thread_time() - start, seed))
            used += good
            if not good:
                assert reason and "\n" not in reason and " at 0x" not in reason, (seed, reason)
                assert one(seed, data) == (good, reason) or seed % 20, (seed, reason)
                reasons.add(reason)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    check_good()
    print(
        json.dumps(
            {
                "used": used,
                "slowest": slowest,
                "megabytes": growth,
                "reasons": len(reasons),
                "switch": bool(ImageFile.LOAD_TRUNCATED_IMAGES),
            }
        )
    )


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))


def test_nothing_is_printed_about_damaged_tiff_files(tmp_path):
    """libtiff writes to the process's stderr by itself."""
    image = io.BytesIO()
    Image.effect_noise((300, 200), 90).save(image, "TIFF", compression="tiff_lzw")
    middle = len(image.getvalue()) // 2
    data = image.getvalue()[: middle - 200] + bytes(400) + image.getvalue()[middle + 200 :]
    (tmp_path / "damaged.tif").write_bytes(data)
    script = (
        "import sys, pathlib\n"
        "from selfsight.data.decode import DecodeError, Encoded\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try:\n"
        "        Encoded(path.read_bytes()).decode()\n"
        "    except DecodeError:\n"
        "        print('refused')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "refused\n" and done.stderr == ""
