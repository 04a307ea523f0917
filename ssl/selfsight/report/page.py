"""The page of a run, from its record."""

from collections.abc import Iterator
from typing import Any

from selfsight.pages.parts import document, notes, table, text, tiles
from selfsight.report import look, seen
from selfsight.report.curves import INITIAL, curves
from selfsight.report.difference import shown
from selfsight.report.record import Record

LONGEST = 90  # characters of a value


def page(record: Record) -> str:
    """The whole page as text."""
    sections = [
        ("curves", "Curves", "".join(_curves(record))),
        ("evaluations", "Evaluations", "".join(_evaluations(record))),
        ("neighbours", "Nearest neighbours", "".join(seen.neighbours(record))),
        ("prototypes", "Prototypes", "".join(seen.prototypes(record))),
        ("map", "Map of the images", "".join(seen.image_map(record))),
        ("attention", "Attention", "".join(seen.attention(record))),
        ("crops", "Crops, as the model sees them", "".join(seen.crops(record))),
        ("bad", "Samples that could not be used", "".join(_bad(record))),
        ("configuration", "Configuration", "".join(_configuration(record))),
        ("environment", "Environment", "".join(_environment(record))),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(
        [
            *_head(record),
            f"<nav>{links}</nav>",
            *(f'<h2 id="{key}">{title}</h2>\n{part}' for key, title, part in sections),
        ]
    )
    style = look.STYLE + seen.sheet_style(record)
    return document(f"{record.name}: run", body, style=style, wide=True)


def _head(record: Record) -> Iterator[str]:
    summary = record.summary
    status, verdict = summary.get("status", "?"), summary.get("verdict")
    good = verdict in ("healthy", "warming up")
    pill = "plain" if verdict in (None, "warming up") else "" if good else "warning"
    status_kind = "warning" if status == "failed" else "plain"
    yield (
        f'<div class="head"><h1>{text(record.name)}</h1>'
        f'<span class="pill {status_kind}">{text(status)}</span>'
        + (f'<span class="pill {pill}">{text(verdict)}</span>' if verdict else "")
        + "</div>"
    )
    yield f'<p class="faint">{text(_what(record))}</p>'
    yield tiles(_tiles(record))
    if told := summary.get("verdict_text"):
        level = "good" if verdict == "healthy" else "note" if good else "warning"
        yield notes([{"level": level, "text": told}])


def _what(record: Record) -> str:
    """The run in a line: method, trunk, data, batch."""
    config = record.config

    def leaf(key: str) -> str:
        return str(config.get(key, "?")).rpartition(".")[2]

    steps = config.get("steps")
    length = f"{steps:,} updates" if isinstance(steps, int) else "no end"
    gpus = record.environment.get("gpus") or []
    where = gpus[0] if gpus else record.environment.get("cpu") or record.environment.get("device")
    return (
        f"{leaf('method._target_')} of {leaf('model.trunk._target_')} on "
        f"{leaf('data.train._target_')}; {config.get('batch_size'):,} images an update, {length}, "
        f"{config.get('precision')}; {record.environment.get('world_size', 1)} × {where}"
    )


def _tiles(record: Record) -> Iterator[tuple[str, str, bool]]:
    summary = record.summary
    last = next((m for m in reversed(record.metrics) if "loss" in m), {})
    step, steps = summary.get("step", 0), summary.get("steps")
    if steps:
        yield f"{max(step, last.get('step', 0)) / steps:.0%}", f"of {steps:,} updates", False
    else:
        yield f"{step:,}", "updates", False
    if "knn_top1" in summary:
        begin = summary.get("knn_top1_random_init")
        from_ = f", from {begin:.1f} at random initialisation" if begin is not None else ""
        yield f"{summary['knn_top1']:.1f} %", f"k-NN top-1{from_}", False
    elif "knn_top1_random_init" in summary:
        yield f"{summary['knn_top1_random_init']:.1f} %", "k-NN at random initialisation", False
    if "rank" in summary:
        yield f"{summary['rank']:.1f}", "rank of the features", False
    if "loss" in last:
        yield f"{last['loss']:.3f}", "loss", False
    rate = summary.get("images_per_second") or last.get("images_per_second")
    if rate:
        yield f"{rate:,.0f}", "images per second", False
    if "data_wait" in last:
        wait = last["data_wait"]
        yield f"{wait:.0%}", "of the time waiting for data", wait > 0.3
    if summary.get("skipped_updates"):
        yield f"{summary['skipped_updates']:,}", "updates left out", True


def _curves(record: Record) -> Iterator[str]:
    counts = record.config.get("method.prototypes")
    first = counts[0] if isinstance(counts, list) and counts else counts
    prototypes = first if isinstance(first, int) else None
    found = list(curves(record.metrics, prototypes))
    if found:
        yield f'<div class="cards curves">{"".join(found)}</div>'


def _evaluations(record: Record) -> Iterator[str]:
    heads = {"knn_top1": "k-NN top-1, %", "rank": "rank", "uniformity": "uniformity"}
    rows: list[tuple[str, dict[str, float]]] = []
    for line in record.metrics:
        if "loss" in line:
            continue
        initial = any(f"{key}{INITIAL}" in line for key in heads)
        end = INITIAL if initial else ""
        found = {key: line[f"{key}{end}"] for key in heads if f"{key}{end}" in line}
        if found:
            rows.append(("random initialisation" if initial else f"{line['step']:,}", found))
    if len(rows) > 12:  # the first, the last, and some between
        rows = [rows[round(n * (len(rows) - 1) / 11)] for n in range(12)]
    if rows:
        kept = [key for key in heads if any(key in found for _, found in rows)]
        cells = [
            (when, *(f"{found[key]:.2f}" if key in found else "" for key in kept))
            for when, found in rows
        ]
        yield table(("after step", *(heads[key] for key in kept)), cells)
    done = [_evaluation(name, result) for name, result in record.evaluations.items()]
    done = [row for row in done if row]
    if done:
        head = ("evaluation", "data", "figure", "value and 95 % interval", "how")
        yield table(head, done, words=(0, 1, 2, 4))


def _evaluation(name: str, result: Any) -> tuple[str, ...] | None:
    """A row of `evals/NAME.json`; None where the file is something else."""
    try:
        main, figure = result["main"], result["figures"][result["main"]]
        value, low, high = figure["value"], figure.get("low"), figure.get("high")
        words = f"{value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
        which = name if not result["subject"].get("random_init") else f"{name}, untrained"
        return which, str(result["data"]["name"]), main, words, str(result["protocol"])
    except (KeyError, TypeError, ValueError):
        return None


def _bad(record: Record) -> Iterator[str]:
    if not record.bad:
        return
    total = sum(count for _, count, _ in record.bad)
    yield f"<p>{total:,} in <code>ledger.jsonl</code>.</p>"
    rows = "".join(
        f"<b>{count:,}</b><div>{text(reason)}"
        f'<div class="faint">{text(", ".join(keys) + (", …" if count > len(keys) else ""))}'
        "</div></div>"
        for reason, count, keys in record.bad
    )
    yield f'<div class="card rows">{rows}</div>'


def _configuration(record: Record) -> Iterator[str]:
    if record.changed is not None:
        if record.changed:
            yield "<p>What differs from its recipe:</p>"
            yield table(
                ("key", "recipe", "this run"),
                [(c.key, _short(c.recipe), _short(c.run)) for c in record.changed],
                words=(0, 1, 2),
            )
        else:
            yield "<p>As its recipe has it.</p>"
    keys = "".join(
        f"<span>{text(key)}</span><b>{text(_short(value))}</b>"
        for key, value in record.config.items()
    )
    yield f"<details><summary>All {len(record.config)} keys</summary>"
    yield f'<div class="card keys">{keys}</div></details>'


def _short(value: Any) -> str:
    words = shown(value)
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


def _environment(record: Record) -> Iterator[str]:
    found = dict(record.environment)
    found |= {f"{name}": version for name, version in (found.pop("versions", None) or {}).items()}
    rows = "".join(
        f"<span>{text(key.replace('_', ' '))}</span><b>{text(_short(value))}</b>"
        for key, value in found.items()
        if value not in (None, [], "")
    )
    if rows:
        yield f'<div class="card keys">{rows}</div>'
