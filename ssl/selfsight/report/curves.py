"""The curves of a report: which figures belong together, and what they are called."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfsight.pages.charts import Series, chart

# Figures by name, one chart each: title, their names in metrics.jsonl, and how they are drawn.
CHARTS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("loss", ("loss",), {}),
    ("k-NN top-1, %", ("knn_top1",), {}),
    ("rank of the features", ("rank",), {}),
    ("uniformity of the features", ("uniformity",), {}),
    ("entropy of assignments", ("assignment_entropy", "teacher_entropy", "student_entropy"), {}),
    ("prototypes in use", ("prototypes_used",), {"percent": True, "zero": True}),
    ("spread of the features", ("feature_spread",), {"zero": True}),
    ("gradient norm", ("gradient_norm",), {"zero": True}),
    ("learning rate", ("lr",), {"zero": True}),
    ("weight decay", ("weight_decay",), {"zero": True}),
    ("momentum of the average", ("momentum", "ema_momentum"), {}),
    ("images per second", ("images_per_second",), {"zero": True}),
    ("waiting for data", ("data_wait",), {"percent": True, "zero": True}),
    ("memory, GB", ("memory_gb",), {"zero": True}),
    ("updates left out", ("skipped",), {"zero": True}),
)
NOT_DRAWN = {"step", "skipped_updates"}
INITIAL = "_random_init"


def curves(metrics: Sequence[Mapping[str, Any]], prototypes: int | None) -> Iterator[str]:
    """A card for each figure of the log that changes; those not known above come last."""
    held = columns(metrics)
    drawn: set[str] = set()
    for title, names, how in CHARTS:
        found = [Series(_words(n), *held[n]) for n in names if n in held]
        drawn.update(names)
        if title == "updates left out" and not any(v for s in found for v in s.y):
            continue
        if title in ("weight decay",) and len({v for s in found for v in s.y}) < 2:
            continue
        levels = []
        if prototypes and title in ("loss", "entropy of assignments") and found:
            levels = [(math.log(prototypes), f"ln {prototypes}")]
        if found:
            yield chart(title, found, levels=levels, **how)
    for name in sorted(set(held) - drawn - NOT_DRAWN):
        if len(set(held[name][1])) > 1:
            yield chart(_words(name), [Series(_words(name), *held[name])])


def columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each figure. What was measured at initialisation is its first value."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            steps, values = found.setdefault(name.removesuffix(INITIAL), ([], []))
            steps.append(line["step"])
            values.append(value)
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")
