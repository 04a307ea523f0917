"""Copy detection: find the original of a copy among many images (Copydays' task), with copies made
here of any images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from selfsight.data.sources.folder import ImageFolder
from selfsight.data.sources.part import Part
from selfsight.evals import intervals
from selfsight.evals.average_precision import average_precision, ranking_precision
from selfsight.evals.bench import Bench
from selfsight.evals.copies import STRENGTHS, Copies
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.intervals import Figure
from selfsight.evals.labelled import Split
from selfsight.evals.retrieval import Whitening
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers


class CopyDetection(Evaluator):
    """Copies ask, originals and distractors answer.

    Args:
        originals: images that copies are made of, evenly spaced over the training images; the rest
            are distractors. No label is looked at.
        strengths: weak, strong or both; tables show the last.
        layer: whose vectors are descriptors, joined with the trunk's feature where `joined`.
        joined: as in DINO, which joins the class token with GeM of the patches.
        whiten, whiten_power: PCA whitening taught by the distractors.
        distractors: folder of further distractors; None: none.
        distractor_limit: at most so many of all distractors.
        seed: of the copies.
    """

    def __init__(
        self,
        *,
        originals: int = 200,
        strengths: Sequence[str] = STRENGTHS,
        layer: str = "gem",
        joined: bool = True,
        whiten: bool = True,
        whiten_power: float = 0.5,
        distractors: str | None = None,
        distractor_limit: int = 10_000,
        seed: int = 0,
    ) -> None:
        if originals < 2 or not strengths or set(strengths) - set(STRENGTHS):
            raise ValueError(
                f"eval.copy_detection needs at least 2 originals and strengths of {STRENGTHS}, not "
                f"{originals} and {list(strengths)}"
            )
        self.originals, self.strengths = originals, list(strengths)
        self.names = ["feature", layer] if joined and layer != "feature" else [layer]
        self.whiten, self.whiten_power = whiten, whiten_power
        self.distractors, self.distractor_limit, self.seed = distractors, distractor_limit, seed

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, self.names)
        return self.names

    def evaluate(self, bench: Bench) -> Answer:
        whole = bench.everything
        count = min(self.originals, len(whole) // 2)
        chosen = torch.arange(count) * len(whole) // count
        rest = torch.ones(len(whole), dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero().flatten()
        others = others[torch.arange(min(self.distractor_limit, len(others)))]
        originals, noise = self._describe(whole.part(chosen)), self._describe(whole.part(others))
        if self.distractors is not None:
            more = bench.features(
                ImageFolder(self.distractors), "distractors", self.distractor_limit
            )
            noise = torch.cat([noise, self._describe(more)])
        whitening = Whitening(noise, power=self.whiten_power) if self.whiten else None
        prepare = whitening or (lambda x: F.normalize(x, dim=1))
        pool = torch.cat([prepare(originals), prepare(noise)])
        source = Part(whole.source, whole.features.rows[whole.places[chosen]].numpy(), "originals")
        figures: dict[str, Figure] = {}
        for strength in self.strengths:
            copies = Copies(source, strength, self.seed)
            asked = bench.features(copies, f"{strength} copies")
            cosines = prepare(self._describe(asked)) @ pool.T
            own = (
                asked.features.rows
            )  # the row in the source of copies is the number of the original
            ranks = cosines.argsort(1, descending=True) == own[:, None]
            precisions = torch.tensor([ranking_precision(r) for r in ranks], dtype=torch.float64)
            figures[f"map_{strength}"] = intervals.bootstrap(
                len(own), lambda rows, p=precisions: 100 * p[rows].mean().item(), over="copies"
            )
            figures[f"first_{strength}"] = intervals.accuracy(ranks[:, 0])
            truth = torch.zeros_like(cosines)
            truth[torch.arange(len(own)), own] = 1
            # one list of all pairs: whether one threshold would do (the image similarity challenge)
            top, places = cosines.topk(min(20, len(pool)), 1)
            micro = average_precision(top.flatten(), truth.gather(1, places).flatten())
            kept = truth.gather(1, places).sum().item() / len(own)
            figures[f"micro_ap_{strength}"] = Figure(100 * micro * kept)
        return Answer(
            main=f"map_{self.strengths[-1]}",
            figures=figures,
            protocol=f"synthetic {' and '.join(self.strengths)} copies of {count} images among "
            f"{len(noise):,} distractors, cosine of {' + '.join(self.names)}"
            + (f", PCA whitening (power {self.whiten_power:g})" if self.whiten else ""),
        )

    def _describe(self, split: Split) -> torch.Tensor:
        """Unit vectors of each kind, joined."""
        return torch.cat([F.normalize(split.take(name), dim=1) for name in self.names], 1)
