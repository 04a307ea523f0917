"""Logistic regression in closed form: L-BFGS to convergence over a range of C.

The objective is scikit-learn's, |W|^2 / 2 + C * sum of the cross-entropies, the bias not penalised.
C is chosen on held-out training images, the regression then fitted to all of them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.sources.part import split_indices
from selfsight.evals import intervals
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.heads_sweep import Standardizer
from selfsight.evals.labelled import check_pair
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers


class LogisticRegression(Evaluator):
    """Logistic regression on frozen features.

    Args:
        powers: [lowest, highest, number] of the powers of ten of C.
        layer: whose vectors are used.
        normalize: "standard" (every channel to mean 0, deviation 1), "unit" (every vector to
            length 1) or None.
        holdout: share of the training images by which C is chosen.
        seeds: repeats of the choice, each with another held-out part.
        iterations: most steps of L-BFGS for one C.
        tolerance: of the largest entry of the gradient per image.
    """

    def __init__(
        self,
        *,
        powers: Sequence[float] = (-6.0, 5.0, 23),
        layer: str = "feature",
        normalize: str | None = "standard",
        holdout: float = 0.1,
        seeds: int = 3,
        iterations: int = 200,
        tolerance: float = 1e-5,
    ) -> None:
        if normalize not in ("standard", "unit", None):
            raise ValueError(f"eval.logistic.normalize={normalize!r} is not standard, unit or null")
        if len(powers) != 3 or powers[2] < 1:
            raise ValueError("eval.logistic.powers must be [lowest, highest, number]")
        self.powers, self.layer, self.normalize = list(powers), layer, normalize
        self.holdout, self.seeds = holdout, seeds
        self.iterations, self.tolerance = iterations, tolerance

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        train, test = bench.train, bench.test
        classes = check_pair(train, test)
        prepare = Preparation.of(train.take(self.layer), self.normalize)
        x, y = prepare(train.take(self.layer)).to(bench.device), train.labels.to(bench.device)
        queries = prepare(test.take(self.layer)).to(bench.device)
        found, chosen = [], []
        for seed in range(self.seeds):
            c, score = choose_c(
                x,
                y,
                classes=classes,
                values=self.values(),
                holdout=self.holdout,
                seed=bench.seed + seed,
                iterations=self.iterations,
                tolerance=self.tolerance,
            )
            weight, bias = fit_logistic(
                x, y, classes=classes, c=c, iterations=self.iterations, tolerance=self.tolerance
            )
            predictions = (queries.to(weight.dtype) @ weight + bias).argmax(1).cpu()
            correct = predictions == test.labels
            found.append(intervals.accuracy(correct).value)
            chosen.append({"C": c, "held_out": score})
        top1 = intervals.accuracy(correct)
        if len(set(found)) > 1:
            top1 = intervals.repeated(found, "seeds")
        return Answer(
            main="top1",
            figures={
                "top1": top1,
                "mean_per_class": intervals.mean_per_class(correct, test.labels),
            },
            protocol=f"logistic regression (L-BFGS) on {self.layer}, C of {len(self.values())} "
            f"by {self.holdout:.0%} of the training images held out, then fitted to all",
            details={"seeds": found, "chosen": chosen},
        )

    def values(self) -> list[float]:
        low, high, number = self.powers
        return [10.0**p for p in torch.linspace(low, high, int(number)).tolist()]


class Preparation:
    """How features are scaled before a linear classifier."""

    def __init__(self, standardizer: Standardizer | None, unit: bool) -> None:
        self._standardizer, self._unit = standardizer, unit

    @classmethod
    def of(cls, features: Tensor, kind: str | None) -> "Preparation":
        return cls(Standardizer.of(features) if kind == "standard" else None, kind == "unit")

    def __call__(self, features: Tensor) -> Tensor:
        if self._unit:
            return F.normalize(features, dim=1)
        return self._standardizer(features) if self._standardizer else features


def choose_c(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    values: Sequence[float],
    holdout: float,
    seed: int,
    iterations: int,
    tolerance: float,
) -> tuple[float, float]:
    """The C whose regression names most of a held-out part, and its accuracy in percent. Of equal
    ones the smallest C. It stops where three larger ones in a row have been worse."""
    shares = (1 - holdout, holdout)
    fit, held = split_indices(len(labels), shares, seed, labels.cpu().numpy())
    x, y = features[torch.from_numpy(fit)], labels[torch.from_numpy(fit)]
    queries, answers = features[torch.from_numpy(held)], labels[torch.from_numpy(held)]
    best, best_c, worse = -1.0, values[0], 0
    start = None
    for c in sorted(values):
        weight, bias = fit_logistic(
            x, y, classes=classes, c=c, iterations=iterations, tolerance=tolerance, start=start
        )
        start = (weight, bias)  # the next is near
        predictions = (queries.to(weight.dtype) @ weight + bias).argmax(1)
        score = (predictions == answers).double().mean().item() * 100
        worse = worse + 1 if score < best else 0
        if score > best:
            best, best_c = score, c
        if worse >= 3:
            break
    return best_c, best


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    c: float,
    iterations: int = 200,
    tolerance: float = 1e-5,
    start: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Weights (d, classes) and biases (classes,) that minimise |W|^2 / (2 C n) + mean
    cross-entropy, in `dtype`; the objective of scikit-learn over C n."""
    n, d = features.shape
    x = features.to(dtype)
    if start is None:
        flat = torch.zeros((d + 1) * classes, dtype=dtype, device=x.device)
    else:
        flat = torch.cat([start[0].flatten(), start[1]]).to(dtype)
    flat.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [flat],
        max_iter=iterations,
        max_eval=math.ceil(1.5 * iterations),
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weight, bias = flat[: d * classes].view(d, classes), flat[d * classes :]
        penalty = weight.square().sum() / (2 * c * n)
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty
        loss.backward()
        return loss

    solver.step(objective)  # pyright: ignore[reportArgumentType]  (a tensor is what it takes)
    result = flat.detach()
    return result[: d * classes].view(d, classes), result[d * classes :]
