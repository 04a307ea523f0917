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
    if "knn_top1_random_init" in figures:
        return f"k-NN {figures['knn_top1_random_init']:.1f} % (random)"
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


def comparison(figures: Mapping[str, Any]) -> str:
    """The run's last line: what it ended with beside what it began with."""
    if "test_top1" in figures:
        return (
            f"accuracy on test: {figures['test_top1']:.1f} %, mean over classes "
            f"{figures['test_mean_per_class']:.1f} %"
        )
    if "knn_top1" in figures:
        end, begin = figures["knn_top1"], figures["knn_top1_random_init"]
        return (
            f"k-NN top-1: {begin:.1f} % at random initialisation -> {end:.1f} % after pretraining "
            f"({end - begin:+.1f} points)"
        )
    if "rank" not in figures:
        return "no evaluation"
    return (
        f"no labels, so no k-NN: rank {figures['rank_random_init']:.1f} at random initialisation "
        f"-> {figures['rank']:.1f}, uniformity {figures['uniformity_random_init']:.2f} -> "
        f"{figures['uniformity']:.2f}"
    )
