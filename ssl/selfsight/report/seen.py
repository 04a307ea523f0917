"""The parts of a report that are pictures."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from selfsight.pages.parts import inline, text
from selfsight.pictures.attention import mass_mask
from selfsight.pictures.colours import attention_picture, mask_picture
from selfsight.report.record import Record

MAP_THUMBNAILS = 170  # at most; other images are dots
MAP_COLUMNS, MAP_ROWS = 24, 15  # at most one thumbnail in each cell
SHOWN = 96  # pixels of an attention map


def sheet_style(record: Record) -> str:
    """The thumbnails, once for the whole page."""
    if record.images is None:
        return ""
    columns, rows = record.images["columns"], record.images["rows"]
    return (
        f'.t {{ background-image: url("{record.images["sheet"]}"); '
        f"background-size: {columns * 100}% {rows * 100}%; }}\n"
    )


def _thumbnail(record: Record, index: int, kind: str = "", style: str = "") -> str:
    assert record.images is not None
    columns, rows = record.images["columns"], record.images["rows"]
    across = 100 * (index % columns) / max(1, columns - 1)
    down = 100 * (index // columns) / max(1, rows - 1)
    return f'<i class="t {kind}" style="background-position:{across:.4g}% {down:.4g}%;{style}"></i>'


def neighbours(record: Record) -> Iterator[str]:
    """Those of some images, at the first observation and at the last."""
    if record.images is None or not record.seen:
        return
    labels = record.images["labels"]
    labelled = min(labels, default=-1) >= 0
    told = " Outlined in green: the same class." if labelled else ""
    yield f'<p class="faint">Left the image asked for, then its nearest, by cosine.{told}</p>'
    yield '<div class="pair">'
    for found in record.seen:
        rows = found["neighbours"]
        same = total = 0
        strips = []
        for row in rows:
            parts = [_thumbnail(record, row["image"]), "<i></i>"]
            for index in row["alike"]:
                alike = labelled and labels[index] == labels[row["image"]]
                same, total = same + alike, total + 1
                kind = ("same" if alike else "other") if labelled else ""
                parts.append(_thumbnail(record, index, kind))
            strips.append(f'<div class="strip">{"".join(parts)}</div>')
        share = f": {same / total:.0%} of the same class" if labelled and total else ""
        yield f'<div class="card"><h3>{_when(found)}{share}</h3>{"".join(strips)}</div>'
    yield "</div>"


def prototypes(record: Record) -> Iterator[str]:
    """Images nearest to the most, the median and the least used prototypes."""
    found = record.seen[-1].get("prototypes") if record.seen else None
    if found is None or record.images is None:
        return
    yield (
        f'<p class="faint">{found["used"]:,} of {found["count"]:,} prototypes are nearest to one '
        f"of {found['images']:,} images {_when(record.seen[-1])}. Each row: the images nearest to "
        "one prototype.</p>"
    )
    yield '<div class="protos">'
    for kind in dict.fromkeys(row["kind"] for row in found["rows"]):
        rows = []
        for row in (row for row in found["rows"] if row["kind"] == kind):
            images = "".join(_thumbnail(record, index) for index in row["images"])
            words = f"prototype {row['prototype']:,}: nearest to {row['used']:,}"
            rows.append(f'<div class="proto">{images}</div><p class="faint">{words}</p>')
        yield f'<div class="card"><h3>{text(kind)}</h3>{"".join(rows)}</div>'
    yield "</div>"


def image_map(record: Record) -> Iterator[str]:
    """Images where their features' first two principal components put them."""
    if record.images is None or not record.seen:
        return
    places = record.seen[-1]["map"]
    taken: set[tuple[int, int]] = set()
    dots, thumbnails = [], []
    for index, (x, y) in enumerate(places):
        cell = (int(x * (MAP_COLUMNS - 1)), int(y * (MAP_ROWS - 1)))
        left, top = 4 + 92 * x, 4.5 + 91 * (1 - y)
        where = f"left:{left:.2f}%;top:{top:.2f}%"
        if cell in taken or len(taken) >= MAP_THUMBNAILS:
            dots.append(f'<i class="dot" style="{where}"></i>')
        else:
            taken.add(cell)
            thumbnails.append(_thumbnail(record, index, "", where))
    yield (
        f'<p class="faint">The first two principal components of the features '
        f"{_when(record.seen[-1])}; dots are images for which there was no room.</p>"
    )
    yield f'<div class="card"><div class="map">{"".join([*dots, *thumbnails])}</div></div>'


def attention(record: Record) -> Iterator[str]:
    """Where the class token of the last block looks, each head and their mean."""
    found = record.seen[-1].get("attention") if record.seen else None
    if found is None or record.images is None:
        return
    yield (
        f'<p class="faint">The last block\'s class token {_when(record.seen[-1])}: the mean over '
        "heads, the patches that hold 60 % of it, then each head.</p>"
    )
    rows = []
    sheet = _sheet(record.images)
    for index, maps in zip(found["images"], found["maps"], strict=True):
        heads = np.asarray(maps, np.float32)
        image = _cell(sheet, record.images, index)
        mean = heads.mean(0)
        parts = [f"<figure>{_thumbnail(record, index)}<figcaption>image</figcaption></figure>"]
        pictures = [("mean", attention_picture(image, mean))]
        pictures.append(("mask", mask_picture(image, _mask(mean))))
        pictures += [(f"head {n}", attention_picture(image, head)) for n, head in enumerate(heads)]
        parts += [
            f'<figure><img alt="" src="{inline(picture)}"><figcaption>{name}</figcaption></figure>'
            for name, picture in pictures
        ]
        rows.append(f'<div class="heads">{"".join(parts)}</div>')
    yield f'<div class="card looks">{"".join(rows)}</div>'


def crops(record: Record) -> Iterator[str]:
    """The views of the first update's first images."""
    if record.crops is None:
        return
    sizes, largest = record.crops["sizes"], max(record.crops["sizes"])
    words = ", ".join(
        f"{name} {size} pixels" for name, size in zip(record.crops["groups"], sizes, strict=True)
    )
    yield f'<p class="faint">One image a row, after all augmentation: {text(words)}.</p>'
    rows = []
    for row in record.crops["rows"]:
        parts = []
        for group, size in zip(row, sizes, strict=True):
            side = max(32, round(104 * size / largest))
            parts += [
                f'<img alt="" width="{side}" height="{side}" src="{source}">' for source in group
            ]
            parts.append('<span class="gap"></span>')
        rows.append(f'<div class="views">{"".join(parts[:-1])}</div>')
    yield f'<div class="card crops">{"".join(rows)}</div>'


def _when(found: dict[str, Any]) -> str:
    step = found["step"]
    return f"after step {step:,}" if step else "at random initialisation"


def _mask(values: np.ndarray) -> np.ndarray:
    import torch

    return mass_mask(torch.from_numpy(values)).numpy()


def _sheet(images: dict[str, Any]) -> Image.Image:
    data = base64.b64decode(images["sheet"].partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def _cell(sheet: Image.Image, images: dict[str, Any], index: int) -> Image.Image:
    side = sheet.width // images["columns"]
    left, top = index % images["columns"] * side, index // images["columns"] * side
    return sheet.crop((left, top, left + side, top + side)).resize((SHOWN, SHOWN))
