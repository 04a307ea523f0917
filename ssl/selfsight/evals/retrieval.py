"""Retrieval: images are ranked by the cosine of their descriptors, judged by mean average precision.

Descriptors are generalised means over positions (GeM), optionally whitened by PCA that other images
taught. What is relevant: images of the same class, or a file of ground truth as the revisited Oxford
and Paris benchmarks have (Radenovic et al. 2018, arXiv:1803.11285).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.sources.folder import ImageFolder
from selfsight.evals import intervals
from selfsight.evals.average_precision import ranking_precision
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.intervals import Figure
from selfsight.evals.labelled import Split, check_labelled
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers


class Whitening:
    """PCA whitening: descriptors are centred, turned, and scaled by variance ** -power / 2, then
    brought to unit length (Jegou and Chum 2012; DINO whitens Copydays with power 0.5).

    Args:
        features: (n, d) that teach it.
        width: dimensions kept; None: all that the features span.
        power: 1 makes all variances 1, 0.5 their roots.
    """

    def __init__(self, features: Tensor, *, width: int | None = None, power: float = 0.5) -> None:
        x = F.normalize(features.double(), dim=1)
        self.mean = x.mean(0)
        values, basis = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        values, basis = values.flip(0), basis.flip(1)
        spanned = int((values > values[0] * 1e-9).sum())
        kept = min(width or spanned, spanned, max(1, len(x) - 1))
        self.basis = basis[:, :kept] * values[:kept].pow(-power / 2)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, d) -> unit vectors (n, kept), fp32."""
        x = F.normalize(features.double(), dim=1) - self.mean.to(features.device)
        return F.normalize(x @ self.basis.to(features.device), dim=1).float()


class Retrieval(Evaluator):
    """Every test image asks; the training images and the distractors answer.

    Args:
        layer: whose vectors are descriptors.
        whiten: PCA whitening taught by the distractors, or without any by the training images.
        whiten_power, whiten_width: of it; width None: all dimensions.
        distractors: folder of images that are relevant to nothing; None: none.
        distractor_limit: at most so many.
        ground_truth: JSON {key of the query: {"positive": [keys], "junk": [keys]}}; keys are those
            of the training images (the database). None: the same class is relevant.
        block: queries at a time.
    """

    def __init__(
        self,
        *,
        layer: str = "gem",
        whiten: bool = True,
        whiten_power: float = 0.5,
        whiten_width: int | None = None,
        distractors: str | None = None,
        distractor_limit: int | None = 10_000,
        ground_truth: str | None = None,
        block: int = 256,
    ) -> None:
        self.layer, self.whiten = layer, whiten
        self.whiten_power, self.whiten_width = whiten_power, whiten_width
        self.distractors, self.distractor_limit = distractors, distractor_limit
        self.ground_truth, self.block = ground_truth, block

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        database, queries = bench.train, bench.test
        truth = None
        if self.ground_truth is not None:
            truth = _GroundTruth(self.ground_truth, database, queries)
        else:
            for split in (database, queries):
                check_labelled(split)
        answers, asks = database.take(self.layer), queries.take(self.layer)
        more: Tensor | None = None
        if self.distractors is not None:
            folder = ImageFolder(self.distractors)
            more = bench.features(folder, "distractors", self.distractor_limit).take(self.layer)
        if self.whiten:
            whitening = Whitening(
                answers if more is None else more,
                width=self.whiten_width,
                power=self.whiten_power,
            )
            answers, asks = whitening(answers), whitening(asks)
            more = None if more is None else whitening(more)
        pool = answers if more is None else torch.cat([answers, more])
        precisions = self._precisions(
            F.normalize(pool, dim=1), F.normalize(asks, dim=1), database, queries, truth
        )
        asked = ~precisions.isnan()
        if not asked.any():
            raise ValueError(f"{queries.name}: no query has a relevant image in {database.name}")
        precisions = precisions[asked]
        figure = intervals.bootstrap(
            len(precisions), lambda rows: 100 * precisions[rows].mean().item(), over="queries"
        )
        count = 0 if more is None else len(more)
        return Answer(
            main="map",
            figures={"map": figure, "queries": Figure(float(len(precisions)))},
            protocol=f"retrieval by cosine of {self.layer}"
            + (f", PCA whitening (power {self.whiten_power:g})" if self.whiten else "")
            + f", {len(database):,} images and {count:,} distractors, "
            + ("given ground truth" if truth else "relevant: the same class"),
        )

    def _precisions(
        self,
        pool: Tensor,
        asks: Tensor,
        database: Split,
        queries: Split,
        truth: "_GroundTruth | None",
    ) -> Tensor:
        found = []
        labels = torch.full((len(pool),), -2)
        labels[: len(database)] = database.labels if truth is None else -1
        for start in range(0, len(asks), self.block):
            order = (asks[start : start + self.block] @ pool.T).argsort(1, descending=True)
            for offset, ranking in enumerate(order):
                query = start + offset
                if truth is None:
                    relevant, junk = labels[ranking] == queries.labels[query], None
                else:
                    positive, ignored = truth.sets(query, len(pool))
                    relevant, junk = positive[ranking], ignored[ranking]
                found.append(ranking_precision(relevant, junk))
        return torch.tensor(found, dtype=torch.float64)


class _GroundTruth:
    """What a file says is relevant to each query."""

    def __init__(self, file: str, database: Split, queries: Split) -> None:
        path = Path(file).expanduser()
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"the ground truth {path} cannot be read: {error}") from None
        places = {key: n for n, key in enumerate(database.keys())}
        self._sets: list[tuple[list[int], list[int]]] = []
        for key in queries.keys():  # noqa: SIM118 (not a dictionary)
            entry = content.get(key, {})
            both = []
            for kind in ("positive", "junk"):
                lost = [k for k in entry.get(kind, ()) if k not in places]
                if lost:
                    raise ValueError(
                        f"{path}: {lost[0]}, {kind} for {key}, is not in {database.name}"
                    )
                both.append([places[k] for k in entry.get(kind, ())])
            self._sets.append((both[0], both[1]))

    def sets(self, query: int, size: int) -> tuple[Tensor, Tensor]:
        """Booleans (size,): what is relevant to a query, and what is left out."""
        found = []
        for indices in self._sets[query]:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[indices] = True
            found.append(mask)
        return found[0], found[1]
