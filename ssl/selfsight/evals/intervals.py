"""Figures with 95 % intervals.

A figure from one fitted model on n test images has the uncertainty of those images: Wilson's
interval for an accuracy, a bootstrap over images for anything else. A figure repeated over seeds or
subsets has that of the repeats: Student's t. An interval says which it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Student's t, 97.5 %, for 1 to 30 degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z = 1.959964


@dataclass(frozen=True)
class Figure:
    """A number, with the ends of its 95 % interval and what that is over (None: no interval)."""

    value: float
    low: float | None = None
    high: float | None = None
    over: str | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def accuracy(correct: Tensor) -> Figure:
    """Percent of true entries of a boolean (n,), with Wilson's interval (Wilson 1927)."""
    n = len(correct)
    p = correct.double().mean().item()
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Figure(100 * p, 100 * (centre - half), 100 * (centre + half), f"{n} images")


def mean_per_class(correct: Tensor, labels: Tensor) -> Figure:
    """Mean over classes of the accuracy in percent; classes without an image are left out."""
    classes = int(labels.max()) + 1
    total = torch.bincount(labels, minlength=classes).double()
    good = torch.bincount(labels[correct], minlength=classes).double()
    return Figure((good / total)[total > 0].mean().item() * 100)


def repeated(values: Sequence[float], over: str) -> Figure:
    """Mean of repeats with Student's t interval; of a single one, no interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Figure(mean)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n <= len(_T) + 1 else _Z) * deviation / math.sqrt(n)
    return Figure(mean, mean - half, mean + half, f"{n} {over}")


def bootstrap(
    n: int, statistic: Callable[[Tensor], float], *, over: str, draws: int = 200, seed: int = 0
) -> Figure:
    """`statistic` of all n, with the percentile interval over resampled indices (n,)."""
    generator = torch.Generator().manual_seed(seed)
    found = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)]
    low, high = torch.tensor(found, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return Figure(statistic(torch.arange(n)), low.item(), high.item(), f"{n} {over}, bootstrap")
