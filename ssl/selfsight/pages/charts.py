"""Curves as inline SVG: small multiples that stay legible from a phone to a projector."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from selfsight.pages.parts import text

WIDTH, HEIGHT = 380, 190  # of a chart's own units, about the pixels that it gets
LEFT, RIGHT, TOP, BOTTOM = 46, 370, 10, 166
POINTS = 240  # of a curve; longer ones are averaged, with a band from least to most
COLOURS = 6


@dataclass
class Series:
    """One curve: values `y` at `x`, by name. Values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    across: str = "step",
    levels: Sequence[tuple[float, str]] = (),
    zero: bool = False,
    percent: bool = False,
) -> str:
    """A card with the curves; nothing where no curve has a point.

    Args:
        across: What x counts.
        levels: Values of note, drawn as dashed lines with their names.
        zero: Whether the scale begins at 0.
        percent: Whether values are shares.
    """
    kept = [_thinned(s) for s in series]
    kept = [thin for thin in kept if thin.x]
    if not kept:
        return ""
    low = min(min(thin.low) for thin in kept)
    high = max(max(thin.high) for thin in kept)
    near = [v for v, _ in levels if math.isfinite(v)]
    low, high = min([low, *near]), max([high, *near])
    low = min(low, 0.0) if zero else low
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - max(abs(low) * 0.1, 0.5e-3), high + max(abs(high) * 0.1, 0.5e-3)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x0, x1 = min(thin.x[0] for thin in kept), max(thin.x[-1] for thin in kept)

    def across_at(value: float) -> float:
        return LEFT + (value - x0) / ((x1 - x0) or 1) * (RIGHT - LEFT)

    def up_at(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    def shown(value: float) -> str:
        return (
            f"{value:.4g}".replace("e+0", "e").replace("e-0", "e-")
            if not percent
            else _share(value)
        )

    parts = []
    for tick in ticks:
        y = up_at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = shown(tick)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, anchor in ((x0, "start"), (x1, "end")):
        x = across_at(value) if x1 > x0 else (LEFT if anchor == "start" else RIGHT)
        if anchor == "end" or x1 > x0:
            words = f"{value:,.0f}" + (f" {across}" if anchor == "start" else "")
            words = words if anchor == "end" else f"{across} {value:,.0f}"
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text(words)}</text>'
            )
    for value, name in levels:
        if math.isfinite(value):
            y = up_at(value)
            parts.append(
                f'<line class="level" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{RIGHT}" y="{y - 4:.1f}" text-anchor="end">{text(name)}</text>'
            )
    for number, thin in enumerate(kept):
        colour = f"var(--s{number % COLOURS + 1})"
        if thin.banded:
            edge = [(across_at(x), up_at(v)) for x, v in zip(thin.x, thin.high, strict=True)]
            edge += [
                (across_at(x), up_at(v)) for x, v in zip(thin.x[::-1], thin.low[::-1], strict=True)
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
            parts.append(f'<polygon class="band" fill="{colour}" points="{path}"/>')
        path = " ".join(
            f"{across_at(x):.1f},{up_at(y):.1f}" for x, y in zip(thin.x, thin.y, strict=True)
        )
        if len(thin.x) > 1:
            parts.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
        if len(thin.x) <= 24:
            parts += [
                f'<circle cx="{across_at(x):.1f}" cy="{up_at(y):.1f}" r="2.6" fill="{colour}"/>'
                for x, y in zip(thin.x, thin.y, strict=True)
            ]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}"/>')
    data = {
        "across": across,
        "box": {"left": LEFT, "right": RIGHT, "width": WIDTH, "x0": x0, "x1": x1},
        "series": [
            {"name": thin.name, "x": thin.x, "y": [shown(v) for v in thin.y]} for thin in kept
        ],
    }
    last = kept[0]
    idle = f"{shown(last.y[-1])} at the end" if len(kept) == 1 else ""
    legend = ""
    if len(kept) > 1:
        legend = '<div class="legend">' + "".join(
            f'<span><i style="background:var(--s{n % COLOURS + 1})"></i>{text(thin.name)} '
            f"{shown(thin.y[-1])}</span>"
            for n, thin in enumerate(kept)
        )
        legend += "</div>"
    points = text(json.dumps(data, separators=(",", ":")))
    return (
        f'<div class="card"><h3>{text(title)}</h3>{legend}'
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(title)}" data-points="{points}">{"".join(parts)}</svg>'
        f'<div class="readout">{idle}</div></div>'
    )


@dataclass
class _Thin:
    """A curve of few points, with the least and most of what each stands for."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    banded: bool


def _thinned(series: Series) -> _Thin:
    pairs = [
        (float(x), float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if y is not None and math.isfinite(y)
    ]
    size = max(1, -(-len(pairs) // POINTS))
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    ys = [[y for _, y in group] for group in groups]
    return _Thin(
        series.name,
        [group[-1][0] for group in groups],
        [sum(group) / len(group) for group in ys],
        [min(group) for group in ys],
        [max(group) for group in ys],
        size > 1,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values from at most `low` to at least `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    for factor in (1, 2, 2.5, 5, 10):
        if (high - low) / (step * factor) <= 4:
            step *= factor
            break
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _share(value: float) -> str:
    return f"{value:.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:.1%}"
