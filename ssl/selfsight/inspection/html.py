"""The report as one page: nothing is loaded from elsewhere, for light and dark, for phones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from selfsight.inspection.notes import cores
from selfsight.inspection.pictures import CELL, Picture
from selfsight.inspection.table import UNITS, number
from selfsight.pages import parts
from selfsight.pages.parts import bars, document, table
from selfsight.pages.parts import text as _text


def page(report: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page as text."""
    title = f"{report['data']['name']}: what is in it"
    body = "\n".join([*_head(report), *_sources(report["sources"]), *_bad(report["bad"])])
    body += "\n".join([*_images(report), *_sheet(pictures), *_crops(report, pictures)])
    body += "\n".join([*_pixels(report["pixels"]), *_speed(report["speed"])])
    return document(title, body)


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
    yield parts.tiles(tiles)
    yield parts.notes(report["notes"])


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
        yield table(("source", "read", "share", "cannot be used", "median megapixels"), cells)


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
    yield bars("formats, by content", images["formats"])
    yield bars("modes of the pixels", images["modes"])
    shares = {k: f["count"] for k, f in images["kinds"].items() if f["count"]}
    for key, word in (("black", "nearly black"), ("plain", "nearly one colour")):
        shares[word] = images[key]["count"]
    shares["copies of others"] = images["duplicates"]["count"]
    yield bars("of the images", shares, of=report["sample"]["used"])
    if labels:
        yield bars(f"labels: {labels['classes']:,} classes", labels["counts"])
    yield "</div>"
    sets = images["duplicates"]["sets"]
    if sets:
        yield "<h2>Equal byte by byte</h2>"
        rows = [(f"{s['images']:,}", ", ".join(s["keys"])) for s in sets]
        yield table(("images", "for example"), rows, words=(1,))


def _sheet(pictures: Sequence[Picture]) -> Iterable[str]:
    if not pictures:
        return
    yield '<h2>Images, upright and whole</h2><div class="sheet">'
    for item in pictures:
        yield (
            f'<figure title="{_text(item.key)}"><img alt="" src="{parts.inline(item.image, CELL)}">'
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
    yield table(("group", "views", "enlarged", "median magnification"), rows)
    largest = max(group["size"] for group in groups.values())
    for item in pictures:
        if not item.views:
            continue
        shown = [f'<img class="whole" alt="" src="{parts.inline(item.image, CELL)}">']
        for views in item.views:
            side = max(24, round(CELL * 0.72 * views[0].width / largest))
            shown.append('<span class="gap"></span>')
            shown += [
                f'<img alt="" width="{side}" height="{side}" src="{parts.inline(view, CELL)}">'
                for view in views
            ]
        yield f'<div class="views" title="{_text(item.key)}">{"".join(shown)}</div>'


def _pixels(pixels: dict[str, Any]) -> Iterable[str]:
    yield "<h2>Channels</h2>"
    rows = []
    for name in ("configured", "estimated"):
        values = pixels[name]
        if values:
            mean, std = (", ".join(f"{v:.3f}" for v in values[k]) for k in ("mean", "std"))
            count = f" from {values['images']:,} images" if "images" in values else ""
            rows.append((name + count, mean, std))
    yield table(("values in [0, 1]", "mean", "standard deviation"), rows)


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
        yield table(("one core", "ms an image", "images/s", "share"), rows)
        rows = [
            (
                f"{r['images_per_second']:,.0f}",
                cores(r["colour_by_workers"]),
                cores(r["colour_on_device"]),
            )
            for r in stages["cores"]
        ]
        yield table(("images/s wanted", "loader", "with loader.colour=device"), rows)
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


def _histogram(name: str, found: dict[str, Any]) -> str:
    counts = found["histogram"]["counts"]
    most, wide = max(counts), 240 / len(counts)
    drawn = "".join(
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
        '<svg class="histogram" viewBox="0 0 240 60" preserveAspectRatio="none" role="img">'
        f"{drawn}</svg>"
        f'<div class="ends">{ends}</div><div class="faint">{middle}</div>'
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in counts.items())
