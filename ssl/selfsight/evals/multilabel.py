"""Images that show several classes: mean average precision of one classifier a class.

Linear SVMs are VOC07's protocol (Everingham et al. 2010; Goyal et al. 2019, arXiv:1905.01235): one
against the rest on features of unit length, C of each class chosen on held-out training images,
and, low-shot, k positive images a class. Linear heads are logistic regressions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.sources.part import split_indices
from selfsight.evals import intervals
from selfsight.evals.average_precision import average_precision, interpolated_precision
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.heads_sweep import Standardizer
from selfsight.evals.intervals import Figure
from selfsight.evals.labelled import Split, check_same_names
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers

CLASSIFIERS = ("svm", "linear")


class MultiLabel(Evaluator):
    """Mean average precision over classes.

    Args:
        classifiers: svm, linear or both; tables show the first.
        costs: values of C, of each class the best on held-out images; of logistic regressions C is
            the same number times the images.
        layer: whose vectors are used.
        holdout: share of the training images by which C is chosen.
        eleven_points: VOC2007's interpolated precision and not the area.
        shots: positive images a class of the low-shot protocol; [] leaves it out.
        shot_seeds: subsets of each number.
        shot_negatives: negatives for each positive of a subset.
        iterations: most steps of L-BFGS.
    """

    def __init__(
        self,
        *,
        classifiers: Sequence[str] = CLASSIFIERS,
        costs: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
        layer: str = "feature",
        holdout: float = 0.2,
        eleven_points: bool = False,
        shots: Sequence[int] = (1, 4, 16),
        shot_seeds: int = 5,
        shot_negatives: int = 19,
        iterations: int = 100,
    ) -> None:
        if not classifiers or (unknown := set(classifiers) - set(CLASSIFIERS)):
            raise ValueError(f"eval.multilabel.classifiers: {unknown} are not svm or linear")
        self.classifiers, self.costs, self.layer = list(classifiers), list(costs), layer
        self.holdout, self.iterations = holdout, iterations
        self.precision = interpolated_precision if eleven_points else average_precision
        self.shots, self.shot_seeds = list(shots), shot_seeds
        self.shot_negatives = shot_negatives

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        train, test = bench.train, bench.test
        check_same_names(train.source, test.source)
        targets, answers = _targets(train), _targets(test)
        if targets.shape[1] != answers.shape[1]:
            raise ValueError(
                f"{train.name} has {targets.shape[1]} classes and {test.name} {answers.shape[1]}"
            )
        for number, column in enumerate(targets.T):
            if not (column > 0).any() or not (column == 0).any():
                raise ValueError(
                    f"{train.name}: the class {train.class_name(number)} has no image that shows it "
                    "and one that does not"
                )
        features = {"svm": _unit, "linear": _standard}
        figures: dict[str, Figure] = {}
        details: dict[str, object] = {}
        for kind in self.classifiers:
            x, queries = features[kind](train.take(self.layer), test.take(self.layer))
            x, queries = x.to(bench.device), queries.to(bench.device)
            scores, chosen = self._fit_chosen(
                kind, x, targets.to(bench.device), queries, bench.seed
            )
            figures[f"map_{kind}"] = self._figure(scores.cpu(), answers)
            details[f"C_{kind}"] = chosen
        details["classes"] = {
            train.class_name(n): round(
                100 * self.precision(scores.cpu()[judged, n], column[judged]), 2
            )
            for n, column in enumerate(answers.T)
            if (judged := column >= 0).any() and (column > 0).any()
        }
        if "svm" in self.classifiers:
            figures |= self._low_shot(bench, train, test, targets, answers)
        main = f"map_{self.classifiers[0]}"
        return Answer(
            main=main,
            figures=figures,
            protocol=f"{'linear SVMs' if main == 'map_svm' else 'logistic regressions'} on "
            f"{self.layer}, C by {self.holdout:.0%} of the training images held out; mean average "
            f"precision of {answers.shape[1]} classes, {len(test):,} images",
            details=details,
        )

    def _fit_chosen(
        self, kind: str, x: Tensor, targets: Tensor, queries: Tensor, seed: int
    ) -> tuple[Tensor, list[float]]:
        """Scores of the queries (n, classes), with C of each class chosen on held-out images."""
        fit, held = map(
            torch.from_numpy, split_indices(len(x), (1 - self.holdout, self.holdout), seed)
        )
        found = []
        for c in self.costs:
            weight, bias = fit_binary(kind, x[fit], targets[fit], c, iterations=self.iterations)
            found.append(self._precisions((x[held] @ weight + bias).cpu(), targets[held].cpu()))
        best = torch.tensor(found, dtype=torch.float64).nan_to_num(-1).argmax(0)
        scores = torch.empty(len(queries), targets.shape[1], device=x.device)
        for index in best.unique().tolist():
            own = (best == index).nonzero().flatten().to(x.device)
            weight, bias = fit_binary(
                kind, x, targets[:, own], self.costs[index], iterations=self.iterations
            )
            scores[:, own] = queries @ weight + bias
        return scores, [self.costs[i] for i in best.tolist()]

    def _low_shot(
        self, bench: Bench, train: Split, test: Split, targets: Tensor, answers: Tensor
    ) -> dict[str, Figure]:
        x, queries = _unit(train.take(self.layer), test.take(self.layer))
        figures = {}
        for k in self.shots:
            means = []
            for seed in range(self.shot_seeds):
                generator = torch.Generator().manual_seed(1000 * bench.seed + seed)
                precisions = []
                for n, (column, asked) in enumerate(zip(targets.T, answers.T, strict=True)):
                    positive = (column > 0).nonzero().flatten()
                    negative = (column == 0).nonzero().flatten()
                    if len(positive) < k:
                        raise ValueError(
                            f"{train.name}: the class {train.class_name(n)} has {len(positive)} images "
                            f"and {k} are asked for"
                        )
                    few = positive[torch.randperm(len(positive), generator=generator)[:k]]
                    rest = torch.randperm(len(negative), generator=generator)
                    rows = torch.cat([few, negative[rest[: k * self.shot_negatives]]])
                    weight, bias = fit_binary(
                        "svm", x[rows], column[rows, None], 1.0, iterations=self.iterations
                    )
                    judged = asked >= 0
                    scores = (queries @ weight + bias)[:, 0]
                    precisions.append(self.precision(scores[judged], asked[judged]))
                means.append(100 * float(torch.tensor(precisions).nanmean()))
            figures[f"map_svm_{k}_shot"] = intervals.repeated(means, "subsets")
        return figures

    def _precisions(self, scores: Tensor, targets: Tensor) -> list[float]:
        return [
            self.precision(s[t >= 0], t[t >= 0]) for s, t in zip(scores.T, targets.T, strict=True)
        ]

    def _figure(self, scores: Tensor, targets: Tensor) -> Figure:
        def mean(rows: Tensor) -> float:
            return 100 * float(
                torch.tensor(self._precisions(scores[rows], targets[rows])).nanmean()
            )

        return intervals.bootstrap(len(scores), mean, over="images")


def fit_binary(
    kind: str, x: Tensor, targets: Tensor, c: float, *, iterations: int
) -> tuple[Tensor, Tensor]:
    """One classifier against the rest for each column, all by one L-BFGS in float64.

    svm: |w|^2 / 2 + C sum of squared hinges, scikit-learn's LinearSVC but with the bias left out of
    the penalty. linear: the same with the logistic loss, C counted per image.

    Args:
        x: (n, d).
        targets: (n, classes) of 1, 0 and -1; what is not judged does not count.

    Returns:
        weights (d, classes) and biases (classes,), in the dtype of x.
    """
    n, d = x.shape
    classes = targets.shape[1]
    data = x.double()
    signs = torch.where(targets > 0, 1.0, -1.0).double()
    counts = (targets >= 0).double()
    scale = c if kind == "svm" else c * n
    flat = torch.zeros((d + 1) * classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [flat],
        max_iter=iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weight, bias = flat[: d * classes].view(d, classes), flat[d * classes :]
        margins = signs * (data @ weight + bias)
        losses = (1 - margins).clamp(min=0).square() if kind == "svm" else F.softplus(-margins)
        # divided by what does not change the minimum, so that one tolerance does for all C
        total = weight.square().sum() / (2 * scale * n) + (losses * counts).sum() / n
        total.backward()
        return total

    solver.step(objective)  # pyright: ignore[reportArgumentType]  (a tensor is what it takes)
    found = flat.detach().to(x.dtype)
    return found[: d * classes].view(d, classes), found[d * classes :]


def _targets(split: Split) -> Tensor:
    """int8 (n, classes); single labels become sets of one."""
    if split.multilabel:
        return split.labels
    missing = split.labels < 0
    if missing.any():
        raise ValueError(f"{split.name}: {int(missing.sum())} of {len(split)} images have no label")
    count = len(split.source.classes) if split.source.classes else int(split.labels.max()) + 1
    return F.one_hot(split.labels, count).to(torch.int8)


def _unit(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(x, dim=1), F.normalize(queries, dim=1)


def _standard(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    scale = Standardizer.of(x)
    return scale(x), scale(queries)
