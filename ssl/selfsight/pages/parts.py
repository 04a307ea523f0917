"""A page and the parts that pages are made of, as text. Whatever comes from outside is escaped."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from selfsight.pages.style import SCRIPT, STYLE

MOST = 16  # rows of a list that may be long


def document(title: str, body: str, *, style: str = "", wide: bool = False) -> str:
    """The whole page; `style` is added to the common one."""
    kind = ' class="wide"' if wide else ""
    script = f"<script>{SCRIPT}</script>" if "data-points" in body else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body{kind}>{body}{script}</body></html>\n"
    )


def plain(text: str) -> str:
    """Text from strangers with nothing in it that a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text)


def text(value: object) -> str:
    """Anything as text that HTML shows as it is."""
    return escape(plain(str(value)))


def tiles(items: Iterable[tuple[str, str, bool]]) -> str:
    """Large figures: (value, what it is, whether it is a warning)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="{"tile warning" if warned else "tile"}"><b>{text(value)}</b>'
            f"<span>{text(label)}</span></div>"
            for value, label, warned in items
        )
        + "</div>"
    )


def notes(items: Iterable[Mapping[str, str]]) -> str:
    """Sentences that matter, each {level: warning, note or good, text}."""
    found = "".join(f'<li class="{n["level"]}">{text(n["text"])}</li>' for n in items)
    return f'<ul class="notes">{found}</ul>' if found else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table in a card; the columns numbered in `words` hold words, the others figures."""

    def cell(n: int, value: str) -> str:
        return f'<td class="text">{text(value)}</td>' if n in words else f"<td>{text(value)}</td>"

    def title(n: int, value: str) -> str:
        left = ' style="text-align:left"' if n in words else ""
        return f"<th{left}>{text(value)}</th>"

    top = "".join(title(n, value) for n, value in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell(n, value) for n, value in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="card scroll"><table><tr>{top}</tr>{body}</table></div>'


def bars(title: str, counts: Mapping[str, int], of: int | None = None) -> str:
    """Counts as bars in a card, with their shares of all, or of `of`."""
    items = list(counts.items())
    most, total = max([1, *counts.values()]), max(1, of or sum(counts.values()))
    rows = "".join(
        f'<span>{text(name)}</span><i style="width:{100 * count / most:.1f}%"></i>'
        f"<span>{count:,} ({count / total:.1%})</span>"
        for name, count in items[:MOST]
    )
    more = f'<p class="faint">and {len(items) - MOST:,} more</p>' if len(items) > MOST else ""
    return f'<div class="card"><h3>{text(title)}</h3><div class="bars">{rows}</div>{more}</div>'


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as the bytes of a JPEG or PNG file."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return file.getvalue()


def inline(image: Image.Image, most: int | None = None, kind: str = "JPEG") -> str:
    """The image as an address that holds it, its width at most `most` pixels."""
    if most is not None and image.width > most:
        size = (most, max(1, most * image.height // image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return address(encoded(image, kind), kind)


def address(data: bytes, kind: str = "JPEG") -> str:
    """The bytes of an image file as an address that holds them."""
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode()
