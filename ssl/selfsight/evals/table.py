"""One table over runs and checkpoints: markdown, csv or html."""

import csv
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfsight.config import flat
from selfsight.evals.intervals import Figure, repeated
from selfsight.evals.published import beside
from selfsight.evals.reporting import read_results
from selfsight.pages.parts import document

NOT_VARIED = ("name", "runs_dir", "cluster.chosen")
MOST_KEYS = 6  # of a study's configuration that its table shows


@dataclass(frozen=True)
class Column:
    """What is measured: evaluator, data, and how many labels were used (None: all)."""

    data: str
    evaluator: str
    images: str | None
    figure: str

    def __str__(self) -> str:
        labels = f", {self.images}" if self.images else ""
        what = "" if self.figure.startswith("top1") else f" {self.figure}"
        return f"{self.data}: {self.evaluator}{what}{labels}"


@dataclass
class Cell:
    """Results of one trunk in one column: one, or repeats."""

    results: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, name: str) -> Figure:
        """The figure; the mean of repeats, whose interval is over them."""
        found = [Figure(**result["figures"][name]) for result in self.results]
        if len(found) == 1:
            return found[0]
        over = "subsets" if "subset" in self.results[0]["details"] else "seeds"
        return repeated([figure.value for figure in found], over)

    @property
    def seconds(self) -> float:
        """Time of the evaluation, all repeats, with the extraction of features."""
        return sum(sum(result.get("seconds", {}).values()) for result in self.results)

    @property
    def protocol(self) -> str:
        return str(self.results[0]["protocol"])


@dataclass
class Table:
    """Rows are trunks, columns are what was measured."""

    rows: dict[str, dict[Column, Cell]]

    @property
    def columns(self) -> list[Column]:
        found = {column for cells in self.rows.values() for column in cells}
        return sorted(found, key=lambda c: (c.data, c.evaluator, c.images or "", c.figure))


def collect(folders: Sequence[Path]) -> Table:
    """The results of runs; a folder may also be one of results.

    Raises:
        ValueError: there are none.
    """
    rows: dict[str, dict[Column, Cell]] = {}
    for folder in folders:
        place = folder / "evals" if (folder / "evals").is_dir() else folder
        for result in read_results(place):
            subject, details = result["subject"], result.get("details", {})
            step = result.get("step_asked", details.get("step"))
            name = folder.name + (f", step {step}" if step is not None else "")
            name += ", random initialisation" if subject.get("random_init") else ""
            column = Column(
                result["data"]["name"], result["evaluator"], details.get("images"), result["main"]
            )
            rows.setdefault(name, {}).setdefault(column, Cell()).results.append(result)
    if not rows:
        places = ", ".join(str(f) for f in folders[:3]) or "no folder"
        raise ValueError(f"there are no results of evaluations in {places}: run launch/evaluate.py")
    return Table(rows)


def render(table: Table, form: str) -> str:
    """The table as `md`, `csv` or `html`, a page."""
    if form == "html":
        return document("Evaluations", f"<h1>Evaluations</h1>{html_table(table)}")
    return {"md": _markdown, "csv": _csv}[form](table)


def _cells(table: Table) -> Iterable[tuple[str, list[str]]]:
    for name, cells in table.rows.items():
        texts = []
        for column in table.columns:
            cell = cells.get(column)
            texts.append("" if cell is None else _text(cell, column))
        yield name, texts


def _text(cell: Cell, column: Column) -> str:
    figure = cell.figure(column.figure)
    text = f"{figure.value:.2f}"
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low:.1f}, {figure.high:.1f}]"
    return text + (f" ({cell.seconds:.0f} s)" if cell.seconds else "")


def _published(table: Table) -> list[tuple[str, str, float, str]]:
    return [
        (p.model, str(column), p.value, p.source)
        for column in table.columns
        for p in beside(column.evaluator, column.data)
    ]


def _protocols(table: Table) -> list[tuple[str, str]]:
    found = []
    for column in table.columns:
        cell = next(cells[column] for cells in table.rows.values() if column in cells)
        found.append((str(column), f"{cell.protocol}; interval over {_over(cell, column)}"))
    return found


def _over(cell: Cell, column: Column) -> str:
    return cell.figure(column.figure).over or "nothing"


def _markdown(table: Table) -> str:
    head = ["trunk", *map(str, table.columns)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join([name, *texts])} |" for name, texts in _cells(table)]
    lines += ["", "Value [95 % interval] (seconds).", ""]
    lines += [f"- {column}: {protocol}" for column, protocol in _protocols(table)]
    if published := _published(table):
        lines += ["", "| published | column | value | source |", "|---|---|---|---|"]
        lines += [f"| {m} | {c} | {v} | {s} |" for m, c, v, s in published]
    return "\n".join(lines) + "\n"


def _csv(table: Table) -> str:
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(("trunk", "data", "evaluator", "images", "figure", "value", "low", "high", "over",
                  "seconds", "protocol"))  # fmt: skip
    for name, cells in table.rows.items():
        for column, cell in cells.items():
            for key in cell.results[0]["figures"]:
                f = cell.figure(key)
                what = (name, column.data, column.evaluator, column.images, key)
                seconds = round(cell.seconds, 1)
                out.writerow((*what, f.value, f.low, f.high, f.over, seconds, cell.protocol))
    for model, column, value, source in _published(table):
        out.writerow((f"{model} (published)", column, "", "", "", value, "", "", "", "", source))
    return file.getvalue()


def html_table(table: Table) -> str:
    """The table as part of a page."""

    def row(cells: Iterable[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

    names = (html.escape(str(c)) for c in table.columns)
    lines = ['<div class="card scroll"><table>', row(("trunk", *names), "th")]
    best = {
        column: max(
            cells[column].figure(column.figure).value
            for cells in table.rows.values()
            if column in cells
        )
        for column in table.columns
    }
    for name, cells in table.rows.items():
        texts = []
        for column in table.columns:
            if (cell := cells.get(column)) is None:
                texts.append("")
                continue
            figure = cell.figure(column.figure)
            value = f"{figure.value:.2f}"
            value = f"<span class=best>{value}</span>" if figure.value == best[column] else value
            if figure.low is not None:
                value += f" <small>[{figure.low:.1f}, {figure.high:.1f}]</small>"
            texts.append(f"<span title='{html.escape(cell.protocol, True)}'>{value}</span>")
        lines.append(row((html.escape(name), *texts)))
    words = "95 % intervals; the protocol is shown over a number."
    lines += [f'</table></div><p class="faint">{words}</p>']
    if published := _published(table):
        lines += ['<h2>Published</h2><div class="card scroll"><table>']
        lines += [row(("model", "column", "value", "source"), "th")]
        lines += [
            row((html.escape(m), html.escape(c), str(v), html.escape(s)))
            for m, c, v, s in published
        ]
        lines += ["</table></div>"]
    return "\n".join(lines) + "\n"


def study(folders: Sequence[Path]) -> str:
    """What a multirun ended with, one line a run: figures of summaries, as markdown."""
    keys = ["status", "step", "images_seen", "knn_top1_random_init", "knn_top1", "test_top1"]
    keys += ["rank", "images_per_second", "seconds", "verdict"]
    found = []
    for folder in folders:
        try:
            summary = json.loads((folder / "summary.json").read_text())
        except (OSError, ValueError):
            summary = {"status": "not there"}
        found.append((folder.name, summary))
    differing = _differing(folders)
    shown = [k for k in keys if any(k in summary for _, summary in found)]
    head = ["run", *differing, *shown]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for index, (name, summary) in enumerate(found):
        values = [*(values[index] for values in differing.values())]
        values += [summary.get(k, "") for k in shown]
        texts = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _differing(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all runs, the first few, with the value of each run."""
    leaves = []
    for folder in folders:
        file = folder / "config.yaml"
        leaves.append(flat(OmegaConf.load(file)) if file.is_file() else {})
    names = dict.fromkeys(key for own in leaves for key in own)
    values = {key: [own.get(key, "") for own in leaves] for key in names if key not in NOT_VARIED}
    varied = {key: v for key, v in values.items() if len({str(x) for x in v}) > 1}
    return dict(list(varied.items())[:MOST_KEYS])
