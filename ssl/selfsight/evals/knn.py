"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018, arXiv:1805.01978,
section 3.4), the field's quickest measure of what a trunk has learnt without labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.evals import intervals
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.labelled import check_labelled, check_pair
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers


class KNN(Evaluator):
    """k-NN of the test images among the training images, for several k at once.

    Args:
        neighbours: numbers of neighbours; one larger than the bank gives way to the whole bank.
        main: the one that tables show.
        temperature: of the weights.
        layer: whose vectors are compared.
        leave_one_out: classify every training image among all others, and use no test split.
        block: queries at a time; memory is block x bank.
    """

    def __init__(
        self,
        *,
        neighbours: Sequence[int] = (10, 20, 100, 200),
        main: int = 20,
        temperature: float = 0.07,
        layer: str = "feature",
        leave_one_out: bool = False,
        block: int = 1024,
    ) -> None:
        if main not in neighbours or min(neighbours) < 1:
            raise ValueError(
                f"eval.knn.main={main} must be one of eval.knn.neighbours={list(neighbours)}, "
                "all of them at least 1"
            )
        self.neighbours, self.main, self.temperature = list(neighbours), main, temperature
        self.layer, self.leave_one_out, self.block = layer, leave_one_out, block

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        bank = bench.everything if self.leave_one_out else bench.train
        queries = bank if self.leave_one_out else bench.test
        if self.leave_one_out:
            check_labelled(bank)
            classes = int(bank.labels.max()) + 1
        else:
            classes = check_pair(bank, queries)
        found = knn_predict_many(
            bank.take(self.layer).to(bench.device),
            bank.labels.to(bench.device),
            queries.take(self.layer).to(bench.device),
            neighbours=self.neighbours,
            temperature=self.temperature,
            classes=classes,
            block=self.block,
            leave_one_out=self.leave_one_out,
        )
        figures = {}
        for k, predictions in found.items():
            correct = predictions.cpu() == queries.labels
            figures[f"top1_k{k}"] = intervals.accuracy(correct)
            if k == self.main:
                figures["mean_per_class"] = intervals.mean_per_class(correct, queries.labels)
        how = "leave-one-out" if self.leave_one_out else f"among {len(bank):,}"
        return Answer(
            main=f"top1_k{self.main}",
            figures=figures,
            protocol=f"k-NN of {len(queries):,} images {how}, cosine of {self.layer}, weights "
            f"exp(cosine / {self.temperature}), k={self.main}",
        )


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    block: int = 1024,
) -> Tensor:
    """Predicted class of each query, (n,) integers: `knn_predict_many` for one k."""
    options = {"temperature": temperature, "classes": classes, "block": block}
    return knn_predict_many(bank, bank_labels, queries, neighbours=[neighbours], **options)[
        neighbours
    ]


@torch.no_grad()
def knn_predict_many(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float = 0.07,
    classes: int | None = None,
    block: int = 1024,
    leave_one_out: bool = False,
) -> dict[int, Tensor]:
    """Predicted class of each query, for each k.

    Each of the k nearest bank features by cosine votes for its label with weight
    exp(cosine / temperature). Exact; queries go in blocks, so memory is block x bank.

    Args:
        bank: (m, d) features, any scale.
        bank_labels: (m,) integers counting from 0.
        queries: (n, d).
        neighbours: the numbers k; a bank of fewer features gives them all.
        classes: Number of classes; by default the largest label and one.
        leave_one_out: the queries are the bank, and none is its own neighbour.

    Returns:
        {k: (n,) integers}.
    """
    classes = classes or int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=1)
    most = min(max(neighbours), len(bank) - leave_one_out)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for start in range(0, len(queries), block):
        similar = F.normalize(queries[start : start + block].float(), dim=1) @ bank.T
        if leave_one_out:
            own = torch.arange(len(similar), device=bank.device)
            similar[own, start + own] = -torch.inf
        cosines, indices = similar.topk(most, dim=1)
        # relative to the nearest: the same ranking, and exp cannot overflow
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        for k, parts in found.items():
            votes = torch.zeros(len(similar), classes, device=bank.device)
            votes.scatter_add_(1, bank_labels[indices[:, :k]], weights[:, :k])
            parts.append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, **options
) -> float:
    """Top-1 accuracy in percent of `knn_predict`, with its options."""
    predictions = knn_predict(bank, bank_labels, queries, **options)
    return (predictions == labels).float().mean().item() * 100
