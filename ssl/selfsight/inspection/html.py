"""The report as one page: nothing is loaded from elsewhere, for light and dark, for phones."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

from selfsight.inspection.notes import cores
from selfsight.inspection.pictures import CELL, Picture, jpeg
from selfsight.inspection.table import UNITS, number, plain

MOST = 16  # rows of a list that may be long

_STYLE = """
:root { color-scheme: light dark; --ground: #f7f6f3; --card: #ffffff; --ink: #1d2126;
  --faint: #666c75; --line: #e2e0da; --bar: #3d6fb4; --warn: #b4501a; --warn-ground: #fbefe6; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1e2125;
  --ink: #e7e5e0; --faint: #9aa0a9; --line: #32363c; --bar: #7aa5e0; --warn: #f0a070;
  --warn-ground: #33251c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 14px 60px; max-width: 1080px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.08rem; margin: 34px 0 10px; }
p { margin: 6px 0; max-width: 72ch; }
.faint, figcaption, th { color: var(--faint); }
.faint { font-size: .9rem; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr));
  margin: 18px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 14px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 600; }
.tile span { color: var(--faint); font-size: .85rem; }
.warning b { color: var(--warn); }
ul.notes { list-style: none; padding: 0; margin: 14px 0; }
ul.notes li { padding: 8px 12px; margin: 6px 0; border-left: 3px solid var(--line);
  background: var(--card); border-radius: 0 8px 8px 0; overflow-wrap: anywhere; }
ul.notes li.warning { border-color: var(--warn); background: var(--warn-ground); }
.cards { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); }
.card h3 { font-size: .95rem; margin: 2px 0 8px; font-weight: 600; }
.cards.tall { margin-top: 10px; }
.cards { align-items: start; }
.rows { display: grid; grid-template-columns: max-content 1fr; gap: 8px 14px; }
.rows > div { overflow-wrap: anywhere; }
.rows b { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: right; font-weight: 400; padding: 3px 8px; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(72px, max-content) 1fr max-content;
  gap: 4px 10px; align-items: center; font-size: .9rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 10px; background: var(--bar); border-radius: 2px; }
.bars span { overflow-wrap: anywhere; }
.bars span:nth-child(3n) { text-align: right; color: var(--faint); }
svg { display: block; width: 100%; height: 74px; fill: var(--bar); }
.ends { display: flex; justify-content: space-between; color: var(--faint); font-size: .8rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
.sheet figure, .views figure { margin: 0; }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  background: #8883; border-radius: 5px; }
figcaption { font-size: .72rem; text-align: center; }
.views { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 10px 0;
  border-bottom: 1px solid var(--line); }
.views img { display: block; border-radius: 4px; }
.views .whole { width: 104px; height: 104px; object-fit: contain; background: #8883; }
.views .gap { width: 10px; }
code { font-size: .86em; overflow-wrap: anywhere; }
"""


def page(report: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page as text."""
    title = f"{report['data']['name']}: what is in it"
    body = "\n".join([*_head(report), *_sources(report["sources"]), *_bad(report["bad"])])
    body += "\n".join([*_images(report), *_sheet(pictures), *_crops(report, pictures)])
    body += "\n".join([*_pixels(report["pixels"]), *_speed(report["speed"])])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _text(text: object) -> str:
    return escape(plain(str(text)))


def _head(report: dict[str, Any]) -> Iterable[str]:
    data, sample, bad = report["data"], report["sample"], report["bad"]
    sizes, stages = report["images"]["sizes"], report["speed"]["one_core"]
    yield f"<h1>{_text(data['name'])}</h1>"
    yield (
        f'<p class="faint">{_text(data["extent"])}. {sample["read"]:,} of them were read, in the '
        f"order of a run; {_text(report['speed']['machine']['time'])}.</p>"
    )
    tiles = [(f"{sample['used']:,}", "images that can be used", False)]
    too_many = bad["share"] > bad["most_allowed"]
    tiles.append((f"{bad['share']:.1%}", "cannot be used", too_many))
    if sizes["width"]:
        median = f"{sizes['width']['median']:,.0f} × {sizes['height']['median']:,.0f}"
        tiles.append((median, "pixels, median width and height", False))
    if sizes["bytes"]:
        tiles.append((f"{number('bytes', sizes['bytes']['median'])} kB", "median file", False))
    if stages:
        tiles.append((f"{stages['images_per_second']:,.0f}", "images/s by one core", False))
    yield '<div class="tiles">'
    for value, label, warned in tiles:
        kind = "tile warning" if warned else "tile"
        yield f'<div class="{kind}"><b>{value}</b><span>{label}</span></div>'
    yield "</div>"
    notes = "".join(f'<li class="{n["level"]}">{_text(n["text"])}</li>' for n in report["notes"])
    yield f'<ul class="notes">{notes}</ul>' if notes else ""


def _sources(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if len(rows) > 1:
        yield "<h2>Sources</h2>"
        cells = [
            (
                r["name"],
                f"{r['read']:,}",
                f"{r['share']:.1%}",
                f"{r['bad_share']:.1%}",
                "" if r["median_megapixels"] is None else f"{r['median_megapixels']:.3g}",
            )
            for r in rows
        ]
        yield _table(("source", "read", "share", "cannot be used", "median megapixels"), cells)


def _bad(bad: dict[str, Any]) -> Iterable[str]:
    yield "<h2>Images that cannot be used</h2>"
    if not bad["count"]:
        yield "<p>None.</p>"
        return
    yield (
        f"<p>{bad['count']:,} of the sample, {bad['share']:.1%}; a run ends above "
        f"{bad['most_allowed']:.0%} (<code>loader.max_bad_share</code>).</p>"
    )
    rows = []
    for row in bad["reasons"]:
        what = f"{_text(_listed(row['what']))}: " if row["what"] else ""
        more = ", …" if row["count"] > len(row["examples"]) else ""
        rows.append(
            f"<b>{row['count']:,}</b><div>{_text(row['reason'])}"
            f'<div class="faint">{what}{_text(", ".join(row["examples"]) + more)}</div></div>'
        )
    yield f'<div class="card rows">{"".join(rows)}</div>'


def _images(report: dict[str, Any]) -> Iterable[str]:
    images, labels = report["images"], report["labels"]
    yield '<h2>What is in it</h2><div class="cards">'
    for name, found in images["sizes"].items():
        if found is not None:
            yield f'<div class="card"><h3>{UNITS[name][0]}</h3>{_histogram(name, found)}</div>'
    yield '</div><div class="cards tall">'
    yield _bars("formats, by content", images["formats"])
    yield _bars("modes of the pixels", images["modes"])
    shares = {k: f["count"] for k, f in images["kinds"].items() if f["count"]}
    for key, word in (("black", "nearly black"), ("plain", "nearly one colour")):
        shares[word] = images[key]["count"]
    shares["copies of others"] = images["duplicates"]["count"]
    yield _bars("of the images", shares, of=report["sample"]["used"])
    if labels:
        yield _bars(f"labels: {labels['classes']:,} classes", labels["counts"])
    yield "</div>"
    sets = images["duplicates"]["sets"]
    if sets:
        yield "<h2>Equal byte by byte</h2>"
        rows = [(f"{s['images']:,}", ", ".join(s["keys"])) for s in sets]
        yield _table(("images", "for example"), rows, text=(1,))


def _sheet(pictures: Sequence[Picture]) -> Iterable[str]:
    if not pictures:
        return
    yield '<h2>Images, upright and whole</h2><div class="sheet">'
    for item in pictures:
        yield (
            f'<figure title="{_text(item.key)}"><img alt="" src="{_inline(item.image)}">'
            f"<figcaption>{item.width:,} × {item.height:,}</figcaption></figure>"
        )
    yield "</div>"


def _crops(report: dict[str, Any], pictures: Sequence[Picture]) -> Iterable[str]:
    groups = report["crops"]
    yield "<h2>Crops, as a model sees them</h2>"
    rows = []
    for name, group in groups.items():
        magnified = group["magnification"]
        median = f"{magnified['median']:.2g}" if magnified else ""
        views = f"{group['views']} of {group['size']} pixels"
        rows.append((name, views, f"{group['enlarged_share']:.1%}", median))
    yield _table(("group", "views", "enlarged", "median magnification"), rows)
    largest = max(group["size"] for group in groups.values())
    for item in pictures:
        if not item.views:
            continue
        parts = [f'<img class="whole" alt="" src="{_inline(item.image)}">']
        for views in item.views:
            side = max(24, round(CELL * 0.72 * views[0].width / largest))
            parts.append('<span class="gap"></span>')
            parts += [
                f'<img alt="" width="{side}" height="{side}" src="{_inline(view)}">'
                for view in views
            ]
        yield f'<div class="views" title="{_text(item.key)}">{"".join(parts)}</div>'


def _pixels(pixels: dict[str, Any]) -> Iterable[str]:
    yield "<h2>Channels</h2>"
    rows = []
    for name in ("configured", "estimated"):
        values = pixels[name]
        if values:
            mean, std = (", ".join(f"{v:.3f}" for v in values[k]) for k in ("mean", "std"))
            count = f" from {values['images']:,} images" if "images" in values else ""
            rows.append((name + count, mean, std))
    yield _table(("values in [0, 1]", "mean", "standard deviation"), rows)


def _speed(speed: dict[str, Any]) -> Iterable[str]:
    here, stages, loader = speed["machine"], speed["one_core"], speed["loader"]
    load = "" if here["load"] is None else f", load {here['load']:.1f}"
    gpu = f", {here['gpu']}" if here["gpu"] else ""
    yield "<h2>Speed</h2>"
    yield (
        f'<p class="faint">Measured on this machine at that time: {_text(here["processor"])}, '
        f"{here['cores']} cores{load}{_text(gpu)}; torch {_text(here['torch'])}.</p>"
    )
    if stages:
        rows = [
            (
                name,
                f"{s['milliseconds']:.2f}",
                f"{s['images_per_second']:,.0f}",
                f"{stages['reads_in_flight']} in flight"
                if s["share"] is None
                else f"{s['share']:.0%}",
            )
            for name, s in stages["stages"].items()
        ]
        total = stages["images_per_second"]
        rows.append(("all", f"{stages['milliseconds']:.2f}", f"{total:,.0f}", ""))
        yield _table(("one core", "ms an image", "images/s", "share"), rows)
        rows = [
            (
                f"{r['images_per_second']:,.0f}",
                cores(r["colour_by_workers"]),
                cores(r["colour_on_device"]),
            )
            for r in stages["cores"]
        ]
        yield _table(("images/s wanted", "loader", "with loader.colour=device"), rows)
        slowest = stages["slowest"]
        yield (
            f'<p class="faint">The slowest image took {slowest["milliseconds"]:,.0f} ms: '
            f"<code>{_text(slowest['key'])}</code></p>"
        )
    if loader and "images_per_second" in loader:
        yield (
            f"<p>The loader of one process: <b>{loader['images_per_second']:,.0f} images/s</b> "
            f"with {loader['workers']} workers, colour by the {loader['colour']}.</p>"
        )


# ------------------------------------------------------------------------------------- parts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    def cell(n: int, value: str) -> str:
        return f'<td class="text">{_text(value)}</td>' if n in text else f"<td>{_text(value)}</td>"

    def title(n: int, value: str) -> str:
        return f'<th style="text-align:left">{value}</th>' if n in text else f"<th>{value}</th>"

    top = "".join(title(n, value) for n, value in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell(n, value) for n, value in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="card scroll"><table><tr>{top}</tr>{body}</table></div>'


def _bars(title: str, counts: dict[str, int], of: int | None = None) -> str:
    items = list(counts.items())
    most, total = max([1, *counts.values()]), max(1, of or sum(counts.values()))
    rows = "".join(
        f'<span>{_text(name)}</span><i style="width:{100 * count / most:.1f}%"></i>'
        f"<span>{count:,} ({count / total:.1%})</span>"
        for name, count in items[:MOST]
    )
    more = f'<p class="faint">and {len(items) - MOST:,} more</p>' if len(items) > MOST else ""
    return f'<div class="card"><h3>{_text(title)}</h3><div class="bars">{rows}</div>{more}</div>'


def _histogram(name: str, found: dict[str, Any]) -> str:
    counts = found["histogram"]["counts"]
    most, wide = max(counts), 240 / len(counts)
    bars = "".join(
        f'<rect x="{n * wide:.1f}" y="{60 - 58 * c / most:.1f}" width="{max(1, wide - 1):.1f}" '
        f'height="{58 * c / most:.1f}"/>'
        for n, c in enumerate(counts)
        if c
    )
    ends = "".join(f"<span>{number(name, found[key])}</span>" for key in ("min", "max"))
    middle = (
        f"median {number(name, found['median'])}, 90 % from {number(name, found['p05'])} to "
        f"{number(name, found['p95'])}"
    )
    return (
        f'<svg viewBox="0 0 240 60" preserveAspectRatio="none" role="img">{bars}</svg>'
        f'<div class="ends">{ends}</div><div class="faint">{middle}</div>'
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in counts.items())


def _inline(image: Image.Image) -> str:
    if image.width > CELL:
        image = image.resize((CELL, CELL * image.height // image.width), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()
