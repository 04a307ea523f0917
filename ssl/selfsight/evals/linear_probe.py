"""Linear probe on cached features: a sweep of learning rates x inputs in one pass.

The sweep is DINOv2's (Oquab et al. 2023, arXiv:2304.07193, appendix B.3): learning rates, the last
block or the last four, with or without the average of the patches. DINOv2 reports the best head on
the test images. Here the head is chosen on a tenth of the training images that no head has seen,
and the test images are looked at once.
"""

from collections.abc import Sequence

import torch

from selfsight.data.sources.part import split_indices
from selfsight.evals import intervals
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.heads_sweep import Standardizer, predict_heads, train_heads
from selfsight.evals.labelled import Split, check_pair
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers

# DINOv2's, per 256 images
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
LARGEST_PASS = 12_500  # DINOv2's number of updates


class LinearProbe(Evaluator):
    """Softmax regression on frozen features.

    Args:
        rates: learning rates per 256 images.
        inputs: what heads see: lists of vectors (`selfsight.trunks.vectors`), joined; None: by the
            kind of trunk.
        steps: updates; None: 30 passes, between 1,000 and 12,500.
        batch_size: images of an update.
        momentum, weight_decay: of SGD.
        standardize: scale every channel to mean 0 and deviation 1, as BatchNorm before the head.
        holdout: share of the training images by which the head is chosen.
        seeds: repeats, each with another held-out part and order of images.
    """

    def __init__(
        self,
        *,
        rates: Sequence[float] = RATES,
        inputs: Sequence[Sequence[str]] | None = None,
        steps: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        standardize: bool = True,
        holdout: float = 0.1,
        seeds: int = 3,
    ) -> None:
        if not 0 < holdout < 1:
            raise ValueError(f"eval.linear_probe.holdout={holdout} must be between 0 and 1")
        if seeds < 1 or not rates or min(rates) <= 0:
            raise ValueError("eval.linear_probe needs at least one seed and rates above 0")
        self.rates, self.inputs, self.steps = list(rates), inputs, steps
        self.batch_size, self.momentum, self.weight_decay = batch_size, momentum, weight_decay
        self.standardize, self.holdout, self.seeds = standardize, holdout, seeds

    def _inputs(self, subject: Subject) -> list[list[str]]:
        if self.inputs is not None:
            return [list(names) for names in self.inputs]
        if layers.is_vit(subject.trunk):
            four = [f"block{i}" for i in range(1, layers.BLOCKS + 1)]
            return [["block1"], ["block1", "patches"], four, [*four, "patches"]]
        return [["feature"], ["c4", "feature"], ["c2", "c3", "c4", "feature"]]

    def layers(self, subject: Subject) -> Sequence[str]:
        wanted = list(dict.fromkeys(name for names in self._inputs(subject) for name in names))
        layers.check(subject.trunk, wanted)
        return wanted

    def evaluate(self, bench: Bench) -> Answer:
        train, test = bench.train, bench.test
        classes = check_pair(train, test)
        inputs = self._inputs(bench.subject)
        found, chosen, held = [], [], []
        per_class = []
        for seed in range(self.seeds):
            best = self._best(bench, train, inputs, classes, bench.seed + seed)
            predictions = best.predict(test)
            correct = predictions == test.labels
            found.append(intervals.accuracy(correct).value)
            per_class.append(intervals.mean_per_class(correct, test.labels).value)
            held.append(best.score)
            chosen.append({"rate": best.rate, "input": best.names, "held_out": best.score})
        top1 = intervals.repeated(found, "seeds")
        if self.seeds == 1:
            top1 = intervals.accuracy(correct)
        heads = len(self.rates) * len(inputs)
        return Answer(
            main="top1",
            figures={
                "top1": top1,
                "mean_per_class": intervals.repeated(per_class, "seeds"),
                "held_out": intervals.repeated(held, "seeds"),
            },
            protocol=f"linear probe on frozen features of the central crop, best of {heads} heads "
            f"by {self.holdout:.0%} of the training images held out, "
            f"{self._updates(len(train))} updates of SGD",
            details={"seeds": found, "chosen": chosen},
        )

    def _updates(self, images: int) -> int:
        if self.steps is not None:
            return self.steps
        return min(LARGEST_PASS, max(1000, 30 * images // self.batch_size))

    def _best(
        self, bench: Bench, train: Split, inputs: list[list[str]], classes: int, seed: int
    ) -> "_Chosen":
        """Train all heads on one part of the training images and choose by the other."""
        shares = (1 - self.holdout, self.holdout)
        fit, held = map(
            torch.from_numpy, split_indices(len(train), shares, seed, train.labels.numpy())
        )
        best: _Chosen | None = None
        scale = min(self.batch_size, len(fit)) / 256
        for names in inputs:
            x = torch.cat([train.take(name, fit) for name in names], 1).to(bench.device)
            standardizer = Standardizer.of(x) if self.standardize else None
            x = standardizer(x) if standardizer else x
            weight, bias = train_heads(
                x,
                train.labels[fit].to(bench.device),
                classes=classes,
                rates=[rate * scale for rate in self.rates],
                steps=self._updates(len(fit)),
                batch_size=self.batch_size,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                generator=torch.Generator().manual_seed(seed),
            )
            head = _Chosen(names, standardizer, weight, bias)
            y = head.predict_all(train.part(held))
            scores = (y == train.labels[held]).double().mean(1) * 100
            top = int(scores.argmax())
            if best is None or scores[top].item() > best.score:
                best = head.only(top, self.rates[top], scores[top].item())
        assert best is not None
        return best


class _Chosen:
    """Heads on one input; after `only`, one of them."""

    def __init__(
        self,
        names: list[str],
        standardizer: Standardizer | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        self.names, self._standardizer = names, standardizer
        self._weight, self._bias = weight, bias
        self.rate, self.score = 0.0, -1.0

    def only(self, index: int, rate: float, score: float) -> "_Chosen":
        one = slice(index, index + 1)
        head = _Chosen(self.names, self._standardizer, self._weight[one], self._bias[one])
        head.rate, head.score = rate, score
        return head

    def predict_all(self, split: Split) -> torch.Tensor:
        """(H, n) classes."""
        parts = []
        for places in torch.arange(len(split)).split(16_384):
            x = torch.cat([split.take(name, places) for name in self.names], 1)
            x = x.to(self._weight.device)
            x = self._standardizer(x) if self._standardizer else x
            parts.append(predict_heads(x, self._weight, self._bias).cpu())
        return torch.cat(parts, 1)

    def predict(self, split: Split) -> torch.Tensor:
        """(n,) classes by the one head."""
        return self.predict_all(split)[0]
