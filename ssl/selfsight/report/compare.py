"""Several runs as one page: what they ended with, how they differ, and their curves overlaid."""

from collections.abc import Iterator, Sequence
from typing import Any

from selfsight.pages.charts import COLOURS, Series, chart
from selfsight.pages.parts import document, table
from selfsight.report.curves import CHARTS, columns
from selfsight.report.difference import ASIDE, FOLLOWING, shown
from selfsight.report.record import Record

LONGEST = 60  # characters of a value


def comparison(records: Sequence[Record], evaluations: str = "") -> str:
    """The whole page as text; `evaluations` is a table of them, as HTML."""
    body = [f"<h1>{len(records)} runs</h1>", "<h2>Where they are</h2>", _state(records)]
    if evaluations:
        body += ["<h2>Evaluations</h2>", evaluations]
    body += ["<h2>How they differ</h2>", _differences(records)]
    if len(records) > COLOURS:
        body.append(f'<p class="faint">The curves are those of the first {COLOURS} runs.</p>')
    drawn = "".join(_curves(records[:COLOURS]))
    if drawn:
        body += ["<h2>Curves</h2>", f'<div class="cards curves">{drawn}</div>']
    return document(f"{len(records)} runs", "\n".join(body), wide=True)


def _state(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        s = record.summary
        rows.append(
            (
                record.name,
                str(s.get("status", "?")),
                str(s.get("verdict", "")),
                f"{s.get('step', 0):,}",
                *(
                    "" if s.get(key) is None else form.format(s[key])
                    for key, form in (
                        ("loss", "{:.4f}"),
                        ("knn_top1_random_init", "{:.1f}"),
                        ("knn_top1", "{:.1f}"),
                        ("rank", "{:.1f}"),
                        ("images_per_second", "{:,.0f}"),
                    )
                ),
            )
        )
    head = ("run", "status", "verdict", "updates", "loss", "k-NN untrained", "k-NN top-1, %")
    return table((*head, "rank", "images/s"), rows, words=(0, 1, 2))


def _differences(records: Sequence[Record]) -> str:
    """Keys whose values are not the same in all runs."""
    keys = sorted({key for record in records for key in record.config})
    rows = []
    for key in keys:
        if key.startswith(ASIDE + FOLLOWING):
            continue
        values = [_short(record.config.get(key)) for record in records]
        if len(set(values)) > 1:
            rows.append((key, *values))
    if not rows:
        return "<p>Their configurations are equal.</p>"
    return table(("key", *(r.name for r in records)), rows, words=range(len(records) + 1))


def _short(value: Any) -> str:
    words = shown(value)
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


def _curves(records: Sequence[Record]) -> Iterator[str]:
    found = [(record.name, columns(record.metrics)) for record in records]
    for title, names, how in CHARTS:
        for name in names:
            series = [Series(run, *held[name]) for run, held in found if name in held]
            if series and (name != "skipped" or any(v for s in series for v in s.y)):
                words = title if len(names) == 1 else name.replace("_", " ")
                yield chart(words, series, **how)
