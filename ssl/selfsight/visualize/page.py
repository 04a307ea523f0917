"""The page of `launch/visualize.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from selfsight.pages.parts import document, inline, notes, text

if TYPE_CHECKING:
    from selfsight.visualize.command import Seen

WIDTH, SMALL = 480, 144  # pixels of a picture, and of a neighbour

_STYLE = """
p.faint { max-width: 100ch; }
.look { display: grid; gap: 10px; margin: 0 0 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(240px, 46%), 1fr)); }
.look.small { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.look img { display: block; width: 100%; border-radius: 7px; }
.look figcaption { padding-top: 3px; overflow-wrap: anywhere; }
"""


def page(
    subject: str,
    description: str,
    notices: Sequence[str],
    seen: Sequence[Seen],
    attends: bool,
    mass: float,
) -> str:
    """The whole page as text."""
    body = "\n".join(
        [
            f"<h1>What {text(subject)} sees</h1>",
            f'<p class="faint">{text(description)}. {len(seen)} images. '
            + (
                "Attention is that of the last block's class token; a mask keeps the patches that "
                f"hold {mass:.0%} of it. "
                if attends
                else ""
            )
            + "Colours of patches are the first three principal components of their features over "
            "all images here: one colour, one meaning.</p>",
            notes({"level": "note", "text": notice} for notice in notices),
            *(part for item in seen for part in _image(item)),
        ]
    )
    return document(f"What {subject} sees", body, style=_STYLE, wide=True)


def _image(item: Seen) -> Iterable[str]:
    yield f"<h2>{text(item.name)}</h2>"
    first = {"image": item.image}
    for name in ("patches", "attention_mean", "mask_mean"):
        if name in item.pictures:
            first[name.replace("_", ", ")] = item.pictures[name]
    yield _row((label, inline(picture, WIDTH)) for label, picture in first.items())
    heads = [name for name in item.pictures if "_head_" in name]
    if heads:
        yield f"<details><summary>{len(heads) // 2} heads</summary>"
        yield _row(
            (name.replace("_", " "), inline(item.pictures[name], WIDTH // 2)) for name in heads
        )
        yield "</details>"
    if item.alike:
        yield '<p class="faint">Nearest neighbours, by cosine of their features</p>'
        yield _row(
            ((f"{cosine:.2f} {name}", inline(image, SMALL)) for name, cosine, image in item.alike),
            small=True,
        )


def _row(items: Iterable[tuple[str, str]], *, small: bool = False) -> str:
    figures = "".join(
        f'<figure><img alt="" src="{source}"><figcaption>{text(label)}</figcaption></figure>'
        for label, source in items
    )
    return f'<div class="look{" small" if small else ""}">{figures}</div>'
