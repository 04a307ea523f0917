"""Figures of features that need no labels, to pick a checkpoint by: rank, uniformity, alignment,
and how prototypes are used."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.data.evaluation import read_images
from selfsight.distributed import checkpoint
from selfsight.evals.bench import Bench
from selfsight.evals.evaluator import Answer, Evaluator
from selfsight.evals.intervals import Figure
from selfsight.evals.spread import rankme, uniformity
from selfsight.evals.subject import Subject
from selfsight.trunks import vectors as layers
from selfsight.trunks.vectors import vectors

_HEAD = "method/head.projection_head."
_PROTOTYPES = "method/prototypes."


class Health(Evaluator):
    """Label-free health of features.

    Args:
        layer: whose vectors are looked at.
        images: most images that rank and uniformity are of, evenly spaced.
        pairs: images of which two random crops are compared, for the alignment.
        crop: share of the area of those crops.
        seed: of the crops.
    """

    def __init__(
        self,
        *,
        layer: str = "feature",
        images: int = 5000,
        pairs: int = 512,
        crop: Sequence[float] = (0.3, 1.0),
        seed: int = 0,
    ) -> None:
        self.layer, self.images, self.pairs, self.crop, self.seed = layer, images, pairs, crop, seed

    def layers(self, subject: Subject) -> Sequence[str]:
        layers.check(subject.trunk, [self.layer])
        return [self.layer]

    def evaluate(self, bench: Bench) -> Answer:
        split = bench.everything
        count = min(self.images, len(split))
        places = torch.arange(count) * len(split) // count
        features = split.take(self.layer, places)
        unit = F.normalize(features, dim=1)
        figures = {
            "rank": Figure(rankme(features)),
            "rank_share": Figure(rankme(features) / min(features.shape)),
            "uniformity": Figure(uniformity(features)),
            "alignment": Figure(self._alignment(bench)),
            "spread": Figure((1 - unit.mean(0).square().sum()).clamp(min=0).sqrt().item()),
        }
        details: dict[str, object] = {}
        usage = self._prototypes(bench, features)
        if usage is not None:
            figures["prototypes_used"] = Figure(usage[0])
            figures["prototype_entropy"] = Figure(usage[1])
        else:
            details["prototypes"] = "the run's newest checkpoint is of another step, or has none"
        return Answer(
            main="rank",
            figures=figures,
            protocol=f"no labels: RankMe of {self.layer} of {count:,} images; alignment: mean "
            f"squared distance of two crops (area {self.crop[0]:g} to {self.crop[1]:g}) of "
            f"{self.pairs} images, unit vectors",
            details=details,
        )

    def _alignment(self, bench: Bench) -> float:
        """Mean squared distance of the unit vectors of two random crops of an image (Wang and Isola
        2020, arXiv:2005.10242, alpha = 2). 0: the same; unrelated ones have 2."""
        source = bench.sets.train
        count = min(self.pairs, len(source))
        images, _, _ = read_images(
            source,
            [i * len(source) // count for i in range(count)],
            size=bench.transform.size,
            resize=bench.transform.resize,
            workers=bench.workers,
            limits=bench.transform.limits,
            pixels=bench.subject.pixels,
        )
        generator = torch.Generator().manual_seed(self.seed)
        total, n = 0.0, 0
        with torch.no_grad():
            for part in images.split(bench.batch_size):
                views = []
                for _ in range(2):
                    normal = bench.subject.normalize(part.to(bench.device))
                    crops = self._crop(normal, generator)
                    found = vectors(bench.subject.trunk, crops, [self.layer])[self.layer]
                    views.append(F.normalize(found, dim=1))
                total += (views[0] - views[1]).square().sum().item()
                n += len(part)
        return total / n

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random square crop of each image, resized to where it came from."""
        b, _, size, _ = images.shape
        low, high = self.crop
        area = torch.rand(b, generator=generator) * (high - low) + low
        side = area.sqrt()
        offset = (torch.rand(b, 2, generator=generator) * 2 - 1) * (1 - side)[:, None]
        theta = torch.zeros(b, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = side
        theta[:, :, 2] = offset
        grid = F.affine_grid(theta, [b, 1, size, size], align_corners=False)
        return F.grid_sample(
            images, grid.to(images.device), padding_mode="reflection", align_corners=False
        )

    def _prototypes(self, bench: Bench, features: Tensor) -> tuple[float, float] | None:
        """Share of the prototypes nearest to some image, and the entropy of that histogram over its
        largest value, for a run of SwAV whose checkpoint belongs to this trunk."""
        run = bench.subject.path.parent
        step = bench.subject.facts.get("step")
        folder = Path(run) / "checkpoints" / f"step_{step:08d}"
        if bench.subject.facts.get("random_init") or self.layer != "feature" or not folder.is_dir():
            return None
        try:
            with checkpoint.Reader(folder, checked=True) as reader:
                names = [n for n in reader.shapes if n.startswith((_HEAD, _PROTOTYPES))]
                weights = {}
                for name in names:
                    whole = name.endswith("num_batches_tracked")
                    weights[name] = torch.empty(
                        reader.shapes[name], dtype=torch.int64 if whole else torch.float32
                    )
                    reader.fill(name, weights[name])
        except checkpoint.CheckpointError:
            return None
        prototypes = weights.get(f"{_PROTOTYPES}0.weight")
        if prototypes is None:
            return None
        projected = F.normalize(_project(features, weights), dim=1)
        nearest = (projected @ prototypes.T).argmax(1)
        counts = torch.bincount(nearest, minlength=len(prototypes)).double()
        shares = counts / counts.sum()
        entropy = -torch.special.xlogy(shares, shares).sum().item()
        most = torch.tensor(float(min(len(prototypes), len(features)))).log().item()
        return (counts > 0).double().mean().item(), entropy / most


def _project(features: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Features through a saved projection head, in evaluation mode."""
    numbers = sorted(
        {int(n.removeprefix(_HEAD).split(".")[0]) for n in weights if n.startswith(_HEAD)}
    )
    linears = [n for n in numbers if weights[f"{_HEAD}{n}.weight"].ndim == 2]
    x = features
    for number in numbers:
        own = {
            k: weights.get(f"{_HEAD}{number}.{k}")
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        if weight.ndim == 2:
            x = F.linear(x, weight, bias)
        else:
            x = F.batch_norm(x, own["running_mean"], own["running_var"], weight, bias)
        if number != linears[-1] and number + 1 not in numbers:
            x = F.relu(x)
    return x
