"""The report for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from selfsight.inspection.notes import needed
from selfsight.pages.parts import plain

REASONS, FORMATS, CLASSES = 12, 12, 8  # lines at most
UNITS = {
    "width": ("width, pixels", 1.0, ",.0f"),
    "height": ("height, pixels", 1.0, ",.0f"),
    "megapixels": ("megapixels", 1.0, ".3g"),
    "aspect_ratio": ("width / height", 1.0, ".3g"),
    "bytes": ("kB of a file", 1e-3, ",.3g"),
}


def number(name: str, value: float) -> str:
    """A size as text, in the unit that `UNITS` says."""
    _, scale, form = UNITS[name]
    value *= scale
    if 0 < value < 0.001:
        return "< 0.001"
    return f"{value:,.0f}" if abs(value) >= 1000 else format(value, form)


def table(report: dict[str, Any]) -> str:
    """All figures in lines, the findings that matter last."""
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    sample, images = report["sample"], report["images"]
    yield plain(
        f"{report['data']['name']} ({report['data']['extent']}): {sample['read']:,} read in "
        f"{sample['seconds']:,.0f} s, {sample['used']:,} can be used"
    )
    if len(report["sources"]) > 1:
        yield ""
        yield f"{'source':<32}{'read':>9}{'share':>8}{'bad':>8}"
        for row in report["sources"]:
            name = plain(row["name"])
            yield f"{name:<32}{row['read']:>9,}{row['share']:>8.1%}{row['bad_share']:>8.1%}"
    yield ""
    yield f"{'':<16}{'smallest':>10}{'5 %':>10}{'median':>10}{'95 %':>10}{'largest':>10}"
    for name, found in images["sizes"].items():
        if found is not None:
            values = (found[key] for key in ("min", "p05", "median", "p95", "max"))
            yield f"{UNITS[name][0]:<16}" + "".join(f"{number(name, v):>10}" for v in values)
    yield ""
    yield "formats   " + _counts(images["formats"], FORMATS)
    yield "modes     " + _counts(images["modes"], FORMATS)
    kinds = {kind: found for kind, found in images["kinds"].items() if found["count"]}
    for name in ("black", "plain", "duplicates"):
        kinds[name] = images[name]
    yield "of them   " + ", ".join(f"{k} {f['share']:.1%}" for k, f in kinds.items())
    if report["labels"]:
        labels = report["labels"]
        yield f"labels    {labels['classes']:,} classes: " + _counts(
            labels["counts"], CLASSES, ": "
        )
    yield from _bad(report["bad"])
    yield from _crops(report["crops"])
    yield from _pixels(report["pixels"])
    yield from _speed(report["speed"])
    yield ""
    for note in report["notes"]:
        yield ("! " if note["level"] == "warning" else "- ") + plain(note["text"])


def _counts(counts: dict[str, int], most: int, sign: str = " ") -> str:
    items = list(counts.items())
    text = ", ".join(f"{plain(name)}{sign}{count:,}" for name, count in items[:most])
    return text + (f" and {len(items) - most:,} more" if len(items) > most else "") or "none"


def _bad(bad: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"cannot be used: {bad['count']:,} ({bad['share']:.1%})"
    for row in bad["reasons"][:REASONS]:
        yield plain(f"{row['count']:>8,}  {row['reason']} ({', '.join(row['examples'][:2])})")
    if len(bad["reasons"]) > REASONS:
        yield f"          and {len(bad['reasons']) - REASONS} more reasons"


def _crops(groups: dict[str, Any]) -> Iterator[str]:
    yield ""
    for name, group in groups.items():
        magnified = group["magnification"]
        text = f", {magnified['median']:.2g} times at the median" if magnified else ""
        yield (
            f"{name + ' crops':<16}{group['views']} of {group['size']} pixels, "
            f"{group['enlarged_share']:.1%} enlarged{text}"
        )


def _pixels(pixels: dict[str, Any]) -> Iterator[str]:
    yield ""
    for name, values in (("configured", pixels["configured"]), ("estimated", pixels["estimated"])):
        if values is not None:
            mean, std = (", ".join(f"{v:.3f}" for v in values[k][:8]) for k in ("mean", "std"))
            yield f"{name:<12}mean {mean}   std {std}"


def _speed(speed: dict[str, Any]) -> Iterator[str]:
    here, stages, loader = speed["machine"], speed["one_core"], speed["loader"]
    load = "" if here["load"] is None else f", load {here['load']:.1f}"
    yield ""
    yield plain(f"measured here and now: {here['processor']}, {here['cores']} cores{load}")
    if stages:
        yield f"{'one core':<12}{'ms / image':>12}{'images/s':>12}{'share':>8}"
        for name, stage in stages["stages"].items():
            share = "" if stage["share"] is None else f"{stage['share']:.0%}"
            if stage["share"] is None:
                share = f"   {stages['reads_in_flight']} in flight"
            yield (
                f"{name:<12}{stage['milliseconds']:>12.2f}{stage['images_per_second']:>12,.0f}"
                f"{share:>8}"
            )
        yield f"{'all':<12}{stages['milliseconds']:>12.2f}{stages['images_per_second']:>12,.0f}"
        for row in stages["cores"]:
            yield f"  {row['images_per_second']:,.0f} images/s need {needed(row)}"
    if loader and "images_per_second" in loader:
        yield (
            f"loader      {loader['images_per_second']:,.0f} images/s with {loader['workers']} "
            f"workers, colour by the {loader['colour']}"
        )
