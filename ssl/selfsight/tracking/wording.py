"""Figures in words, for the console."""

from collections.abc import Mapping
from typing import Any

import torch


def numbers(values: torch.Tensor) -> list[float]:
    """As plain numbers, without the digits that float32 does not have."""
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def latest_figure(figures: Mapping[str, Any]) -> str:
    """The figure shown in the progress of a run."""
    for key in ("test_top1", "top1"):
        if key in figures:
            return f"{figures[key]:.1f} % of {'test' if key == 'test_top1' else 'val'}"
    if "knn_top1" in figures:
        return f"k-NN {figures['knn_top1']:.1f} %"
    for suffix, word in (("_random_init", "random"), ("_start", "start")):
        if f"knn_top1{suffix}" in figures:
            return f"k-NN {figures[f'knn_top1{suffix}']:.1f} % ({word})"
    return f"rank {figures['rank']:.1f}" if "rank" in figures else ""


def figures_text(figures: Mapping[str, float]) -> str:
    """The figures of one evaluation."""
    if "test_top1" in figures or "top1" in figures:
        named = {"val": figures.get("top1"), "test": figures.get("test_top1")}
        found = (f"{value:.1f} % on {part}" for part, value in named.items() if value is not None)
        return f"accuracy {', '.join(found)}"
    if not figures:
        return "nothing to evaluate on yet,"
    if "knn_top1" in figures:
        return f"k-NN top-1 {figures['knn_top1']:.1f} %, rank {figures['rank']:.1f}"
    return (
        f"rank {figures['rank']:.1f}, uniformity {figures['uniformity']:.2f} (no labels: no k-NN)"
    )


BEGINNINGS = {
    "_random_init": "at random initialisation",
    "_start": "with the weights of trunk.init",
}
"""What figures measured before the first update are of, by what their names end with."""


def comparison(figures: Mapping[str, Any]) -> str:
    """The run's last line: what it ended with beside what it began with."""
    if "test_top1" in figures:
        return (
            f"accuracy on test: {figures['test_top1']:.1f} %, mean over classes "
            f"{figures['test_mean_per_class']:.1f} %"
        )
    if "rank" not in figures:
        return "no evaluation"
    suffix = next(s for s in BEGINNINGS if f"rank{s}" in figures)
    where = BEGINNINGS[suffix]
    if "knn_top1" in figures:
        end, begin = figures["knn_top1"], figures[f"knn_top1{suffix}"]
        return (
            f"k-NN top-1: {begin:.1f} % {where} -> {end:.1f} % after pretraining "
            f"({end - begin:+.1f} points)"
        )
    return (
        f"no labels, so no k-NN: rank {figures[f'rank{suffix}']:.1f} {where} "
        f"-> {figures['rank']:.1f}, uniformity {figures[f'uniformity{suffix}']:.2f} -> "
        f"{figures['uniformity']:.2f}"
    )
