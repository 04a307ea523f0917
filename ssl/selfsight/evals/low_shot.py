"""Low-shot classification of frozen features: few labels a class, over several subsets.

k-NN and a linear classifier (logistic regression). The mean and the interval are over subsets.
Fine-tuning on the same subsets: eval=low_shot_finetune.
"""

from collections.abc import Sequence

import torch

from selfsight.evals import intervals
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.knn import knn_predict
from selfsight.evals.labelled import check_pair
from selfsight.evals.logistic import Preparation, choose_c, fit_logistic
from selfsight.evals.subject import Subject
from selfsight.evals.subsets import Amount, Subset, subsets, write_subset
from selfsight.trunks import vectors as layers

CLASSIFIERS = ("knn", "linear")


class LowShot(Evaluator):
    """Classification from few labels.

    Args:
        images: "1 %", "10 %", "5 a class", ...; each subset lies within the larger ones.
        main: the amount that tables show.
        subset_seeds: subsets of each amount.
        classifiers: knn, linear or both.
        layer: whose vectors are used.
        powers: [lowest, highest, number] of the powers of ten of C of the linear classifier, chosen
            on a quarter of the subset where every class has at least four images.
        fallback_c: C where it cannot be chosen.
        neighbours, temperature: of the k-NN; k is at most the number of images a class has.
        save: write the subsets, as lists of keys, beside the results.
    """

    def __init__(
        self,
        *,
        images: Sequence[str] = ("1 %", "10 %"),
        main: str = "10 %",
        subset_seeds: int = 5,
        classifiers: Sequence[str] = CLASSIFIERS,
        layer: str = "feature",
        powers: Sequence[float] = (-4.0, 2.0, 13),
        fallback_c: float = 0.1,
        neighbours: int = 20,
        temperature: float = 0.07,
        save: bool = True,
    ) -> None:
        self.amounts = [Amount.parse(text) for text in images]
        self.main = Amount.parse(main)
        if self.main not in self.amounts:
            raise ValueError(f"eval.low_shot.main={main} is not among images={list(images)}")
        if unknown := set(classifiers) - set(CLASSIFIERS):
            raise ValueError(f"eval.low_shot.classifiers: {unknown.pop()} is not knn or linear")
        self.subset_seeds, self.classifiers, self.layer = subset_seeds, list(classifiers), layer
        self.powers, self.fallback_c = list(powers), fallback_c
        self.neighbours, self.temperature, self.save = neighbours, temperature, save

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        train, test = bench.train, bench.test
        classes = check_pair(train, test)
        found: dict[str, list[float]] = {}
        chosen: dict[str, list[float]] = {}
        keys = train.keys() if self.save else []
        for seed in range(self.subset_seeds):
            cuts = subsets(
                train.labels.numpy(),
                self.amounts,
                seed=seed,
                names=train.source.classes,
                what=train.name,
            )
            for amount, indices in zip(self.amounts, cuts, strict=True):
                few = train.part(torch.from_numpy(indices))
                if self.save and bench.out is not None:
                    subset = Subset(f"{amount.tag}-subset{seed}", [keys[i] for i in indices])
                    write_subset(bench.out / "subsets", train.name, subset)
                x, y = few.take(self.layer).to(bench.device), few.labels.to(bench.device)
                queries = test.take(self.layer).to(bench.device)
                for kind in self.classifiers:
                    if kind == "knn":
                        k = min(self.neighbours, int(torch.bincount(few.labels).max()))
                        guess = knn_predict(
                            x,
                            y,
                            queries,
                            neighbours=k,
                            temperature=self.temperature,
                            classes=classes,
                        )
                    else:
                        guess, c = self._linear(x, y, queries, classes, seed)
                        chosen.setdefault(str(amount), []).append(c)
                    top1 = (guess.cpu() == test.labels).double().mean().item() * 100
                    found.setdefault(f"{kind} {amount}", []).append(top1)
        figures = {name: intervals.repeated(v, "subsets") for name, v in found.items()}
        kind = "linear" if "linear" in self.classifiers else "knn"
        return Answer(
            main=f"{kind} {self.main}",
            figures=figures,
            protocol=f"{kind} classifier on {self.layer} of {self.main} of the labels, "
            f"{self.subset_seeds} subsets, {len(test):,} test images",
            details={"subsets": found, "C": chosen},
        )

    def _linear(
        self, x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor, classes: int, seed: int
    ) -> tuple[torch.Tensor, float]:
        prepare = Preparation.of(x, "standard")
        x, queries = prepare(x), prepare(queries)
        c = self.fallback_c
        counts = torch.bincount(y)
        options = {"iterations": 100, "tolerance": 1e-4}
        if int(counts[counts > 0].min()) >= 4:
            low, high, number = self.powers
            values = [10.0**p for p in torch.linspace(low, high, int(number)).tolist()]
            c, _ = choose_c(
                x, y, classes=classes, values=values, holdout=0.25, seed=seed, **options
            )
        weight, bias = fit_logistic(x, y, classes=classes, c=c, **options)
        return (queries.to(weight.dtype) @ weight + bias).argmax(1), c
