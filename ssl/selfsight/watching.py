"""`launch/watch.py`: a run, seen from anywhere its folder can be read, drawn again and again."""

import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsight.config import ConfigError
from selfsight.pages.parts import plain

BARS = "▁▂▃▄▅▆▇█"
SILENT = 120.0  # seconds without a line, after which a running run is said to be silent
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("knn_top1", "k-NN top-1, %", "{:.1f}"),
    ("rank", "rank", "{:.1f}"),
    ("assignment_entropy", "assignment entropy", "{:.3f}"),
    ("teacher_entropy", "teacher entropy", "{:.3f}"),
    ("prototypes_used", "prototypes used", "{:.3g}"),
    ("gradient_norm", "gradient norm", "{:.3g}"),
    ("lr", "learning rate", "{:.3g}"),
    ("images_per_second", "images/s", "{:.0f}"),
    ("data_wait", "waiting for data", "{:.0%}"),
    ("memory_gb", "memory, GB", "{:.2f}"),
)


@dataclass(frozen=True)
class Watch:
    """What the command takes."""

    run: Path
    every: float = 5.0
    once: bool = False


def settings(arguments: Sequence[str]) -> Watch:
    """Of `run=...`, `every=SECONDS`, `once=true`.

    Raises:
        ConfigError: one sentence.
    """
    values = {"run": "", "every": "5", "once": "false"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in values:
            raise ConfigError(
                f"{argument!r} is not understood: give run=runs/NAME every=5 once=true"
            )
        values[key] = value
    path = Path(values["run"]).expanduser()
    if not values["run"] or not path.is_dir():
        raise ConfigError(f"run={values['run']} is no folder: give run=runs/NAME")
    if not re.fullmatch(r"\d+(\.\d+)?", values["every"]) or not float(values["every"]):
        raise ConfigError(f"every={values['every']} must be a number of seconds above 0")
    if values["once"] not in ("true", "false"):
        raise ConfigError(f"once={values['once']} must be true or false")
    return Watch(path, float(values["every"]), values["once"] == "true")


class Metrics:
    """The lines of a growing metrics.jsonl: each is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._place = 0

    def refresh(self) -> None:
        """Take what was added. A file that has become shorter (the run went back) is read anew."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return
        if size < self._place:
            self.lines, self._place = [], 0
        with self.path.open("rb") as file:
            file.seek(self._place)
            whole, _, _ = file.read().rpartition(b"\n")
        self._place += len(whole) + 1 if whole else 0
        for text in whole.splitlines():
            try:
                self.lines.append(json.loads(text))
            except ValueError:
                continue

    def column(self, name: str) -> list[float]:
        """The finite values of a figure."""
        found = (line.get(name) for line in self.lines)
        return [float(v) for v in found if isinstance(v, int | float) and abs(v) < float("inf")]


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A curve of one line of text; each character is the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [n * len(values) // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((m - low) / span * len(BARS)))] for m in means)


def view(run: Path, metrics: Metrics, now: float) -> Iterator[tuple[str, str]]:
    """The view's lines, as (style, text): `title`, `good`, `bad`, `plain` or `faint`."""
    summary = _summary(run)
    status = str(summary.get("status", "not started"))
    yield "title", plain(f"{run.resolve().name}: {status}")
    step = max([summary.get("step") or 0, *(line.get("step", 0) for line in metrics.lines[-1:])])
    steps = summary.get("steps")
    if steps:
        done = min(1.0, step / steps)
        bar = "█" * round(30 * done) + "░" * (30 - round(30 * done))
        yield "plain", f"{bar} {done:.0%}  {step:,} of {steps:,} updates"
    else:
        yield "plain", f"{step:,} updates"
    verdict = summary.get("verdict")
    if verdict:
        good = verdict in ("healthy", "warming up")
        yield "good" if good else "bad", plain(str(summary.get("verdict_text", verdict)))
    if status == "running" and metrics.path.is_file():
        silent = now - metrics.path.stat().st_mtime
        if silent > SILENT:
            yield "bad", f"nothing was written for {silent / 60:.0f} min"
    yield "plain", ""
    for name, words, form in SHOWN:
        values = metrics.column(name)
        if values:
            yield "plain", f"{words:<20}{form.format(values[-1]):>10}  {sparkline(values)}"
    lines = _count(run / "ledger.jsonl")
    if lines:
        yield "faint", f"{lines:,} samples could not be used (ledger.jsonl)"


def _summary(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def _count(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


STYLES = {"title": "bold", "good": "green", "bad": "bold red", "plain": "", "faint": "dim"}


def watch(asked: Watch) -> None:
    """Draw the view until the run ends, or once. In a terminal with `rich` it is drawn in place;
    elsewhere its lines are printed each time."""
    metrics = Metrics(asked.run / "metrics.jsonl")
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        while _plain(asked, metrics):
            time.sleep(asked.every)
        return

    def drawn() -> Group:
        metrics.refresh()
        lines = view(asked.run, metrics, time.time())
        return Group(
            *(Text(text, STYLES[style], no_wrap=style == "plain") for style, text in lines)
        )

    console = Console()
    if asked.once or not console.is_terminal:
        console.print(drawn())
        return
    with Live(drawn(), console=console, auto_refresh=False) as live:
        while _summary(asked.run).get("status", "running") == "running":
            time.sleep(asked.every)
            live.update(drawn(), refresh=True)


def _plain(asked: Watch, metrics: Metrics) -> bool:
    """Print the view; whether to go on."""
    metrics.refresh()
    print("\n".join(text for _, text in view(asked.run, metrics, time.time())), flush=True)
    return not asked.once and _summary(asked.run).get("status", "running") == "running"


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print("python launch/watch.py run=runs/NAME [every=5] [once=true]")
        return 0
    try:
        watch(settings(arguments))
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
