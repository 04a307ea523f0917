"""Evaluation of a run that learns from labels: chosen on val, reported once on test.

The best state by the accuracy on val is kept in the run's folder and is what the test images are
shown to at the end:

runs/NAME/best.safetensors     weights of trunk and classifiers, step and accuracy in the metadata
          split.json           keys of the val and test images
          labels.json          id2label, label2id
          predictions.csv      of the test images: key, label, prediction, probability, names
          confusion.json       matrix (label, prediction), accuracy of each class
          evals/NAME.json      the figures, as of any evaluation
"""

import csv
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from selfsight.data.decode import DecodeLimits
from selfsight.data.evaluation import read_images
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.source import Source
from selfsight.distributed import collectives
from selfsight.distributed.payload import read_header, write_tensors
from selfsight.distributed.shards import whole_state_dict
from selfsight.evals import intervals, reporting
from selfsight.evals.intervals import Figure
from selfsight.evals.online import calibrated, evaluating
from selfsight.methods.method import Method
from selfsight.tracking.folder import write_whole

KEPT_BYTES = 1 << 30  # of val images that are held in memory between evaluations


class ClassifierEvaluation:
    """Evaluates a method that has `classify(images) -> {input: scores}`.

    Args:
        train: what the run learns from; its class names are written down.
        val: images to choose by; None: the last state is reported.
        test: images to report on; None: those of val are, and the result says so.
        size: side of the square images, pixels.
        folder: of the run.
        report: what else its result says: `evaluator`, `folder`, `suffix` and `facts`; None: the
            result goes to the run's own folder.
    """

    def __init__(
        self,
        *,
        train: Source,
        val: Source | None,
        test: Source | None,
        classes: int,
        size: int,
        batch_size: int,
        limits: DecodeLimits,
        pixels: PixelFormat,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        folder: Path,
        report: dict[str, Any] | None,
    ) -> None:
        if val is None and test is None:
            raise ValueError("eval.split leaves no image to evaluate on")
        self.train, self.val, self.test, self.classes = train, val, test, classes
        self.size, self.batch_size = size, batch_size
        self.limits, self.pixels = limits, pixels
        self.device, self.autocast = device, autocast
        self.folder, self.report = folder, report or {}
        self.best = folder / "best.safetensors"
        self._kept: list[tuple[Tensor, Tensor, list[int]]] | None = None
        self._began = time.monotonic()

    @property
    def protocol(self) -> str:
        """What is measured, in words."""
        parts = []
        if self.val is not None:
            parts.append(f"chosen on {len(self.val):,} images")
        if self.test is not None:
            parts.append(f"reported on {len(self.test):,}")
        return f"accuracy, {' and '.join(parts)}"

    def run(
        self, method: Method, *, calibrate: bool = False, last: bool = False, step: int = 0
    ) -> dict[str, float]:
        """Figures on val, and at the end those on test; nothing of the method is changed.

        Args:
            calibrate: as in `OnlineEvaluation`: before training.
            last: the run is over.
            step: updates so far.
        """
        figures: dict[str, float] = {}
        if self.val is not None:
            images = self._images(self.val, keep=True)
            with (
                calibrated(method.trunk, lambda: self._warm(method))
                if calibrate
                else evaluating(method)
            ):
                scores, labels, _ = self._scores(method, images)
            name, accuracy = max(
                (
                    (n, (s.argmax(1) == labels).float().mean().item() * 100)
                    for n, s in scores.items()
                ),
                key=lambda item: item[1],
            )
            loss = F.cross_entropy(scores[name], labels).item()
            figures = {"top1": accuracy, "val_loss": loss}
            if len(scores) > 1 and not calibrate:
                figures |= {
                    f"top1_{n}": (s.argmax(1) == labels).float().mean().item() * 100
                    for n, s in scores.items()
                }
            if not calibrate and accuracy > self._best_so_far():
                self._keep(method, step, accuracy, name)
        elif last:
            self._keep(method, step, 0.0, next(iter(self._one(method))))
        if last:
            figures |= self._conclude(method)
        return figures

    # ------------------------------------------------------------------------------ the best state

    def _best_so_far(self) -> float:
        found = -1.0
        if collectives.rank() == 0 and self.best.is_file():
            found = float(read_header(self.best)[1]["top1"])
        return collectives.broadcast_json(found)

    def _keep(self, method: Method, step: int, accuracy: float, name: str) -> None:
        evaluated = {"trunk": method.trunk, "classifiers": method.get_submodule("classifiers")}
        weights = {
            f"{prefix}.{key}": tensor
            for prefix, module in evaluated.items()
            for key, tensor in whole_state_dict(module).items()
        }
        if collectives.rank() == 0:
            facts = {"step": str(step), "top1": repr(accuracy), "input": name}
            part = self.best.with_name(f".{self.best.name}.part")
            write_tensors(part, weights, {"format": "pt", **facts})
            part.replace(self.best)
        collectives.barrier()

    def _conclude(self, method: Method) -> dict[str, float]:
        """Show the test images to the best state, and write what was found."""
        facts = read_header(self.best)[1]
        current = {k: v.clone() for k, v in method.state_dict().items()}
        best = load_file(self.best, device=str(self.device))
        own = method.state_dict()
        with torch.no_grad():
            for name, tensor in best.items():
                own[name].copy_(tensor)
        asked = self.test if self.test is not None else self.val
        assert asked is not None
        try:
            with evaluating(method):
                scores, labels, rows = self._scores(method, self._images(asked, keep=False))
        finally:
            with torch.no_grad():
                for name, tensor in current.items():
                    own[name].copy_(tensor)
        chosen = scores[facts["input"]]
        predictions = chosen.argmax(1)
        correct = predictions == labels
        figures = {
            "top1": intervals.accuracy(correct),
            "mean_per_class": intervals.mean_per_class(correct, labels),
            "top5": intervals.accuracy(
                (chosen.topk(min(5, self.classes), 1)[1] == labels[:, None]).any(1)
            ),
        }
        if self.val is not None:
            figures["val_top1"] = Figure(float(facts["top1"]))
        if collectives.rank() == 0:
            self._write(asked, chosen, labels, rows, figures, facts, unread=len(asked) - len(rows))
        collectives.barrier()
        return {
            "test_top1": figures["top1"].value,
            "test_mean_per_class": figures["mean_per_class"].value,
        }

    # ---------------------------------------------------------------------------------- files

    def _write(
        self,
        asked: Source,
        scores: Tensor,
        labels: Tensor,
        rows: list[int],
        figures: dict[str, Figure],
        facts: dict[str, str],
        unread: int,
    ) -> None:
        names = self.train.classes or [str(n) for n in range(self.classes)]
        naming = {
            "id2label": {str(n): name for n, name in enumerate(names)},
            "label2id": {name: n for n, name in enumerate(names)},
        }
        write_whole(self.folder / "labels.json", json.dumps(naming, indent=1) + "\n")
        parts = {"val": self.val, "test": self.test}
        split = {k: [s.key(i) for i in range(len(s))] for k, s in parts.items() if s is not None}
        write_whole(self.folder / "split.json", json.dumps(split) + "\n")
        top, predictions = scores.softmax(1).max(1)
        with (self.folder / "predictions.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(
                ("key", "label", "prediction", "probability", "label_name", "prediction_name")
            )
            found = zip(rows, labels.tolist(), predictions.tolist(), top.tolist(), strict=True)
            for row, label, guess, sure in found:
                key = asked.key(row)
                table.writerow((key, label, guess, f"{sure:.4f}", names[label], names[guess]))
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        matrix.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
        total = matrix.sum(1)
        per_class = {
            name: round(100 * matrix[n, n].item() / int(total[n]), 2) if total[n] else None
            for n, name in enumerate(names)
        }
        confusion = {"classes": names, "matrix": matrix.tolist(), "accuracy": per_class}
        write_whole(self.folder / "confusion.json", json.dumps(confusion) + "\n")
        kind = "test" if self.test is not None else "val, which also chose the state"
        how = f"best of val at step {facts['step']}" if self.val is not None else "last state"
        content = {
            "evaluator": self.report.get("evaluator", "supervised"),
            "subject": self.report.get("subject", {"run": self.folder.name, "random_init": False}),
            "data": {
                "name": self.report.get("data") or self.train.name.split("/")[0].split(",")[0],
                "train": self.train.name,
                "val": None if self.val is None else self.val.name,
                "test": asked.name,
                "classes": self.classes,
                "unusable": {"test": unread},
            },
            "main": "top1",
            "figures": {k: f.plain() for k, f in figures.items()},
            "protocol": f"{self.report.get('protocol', 'supervised training')}; {how}, "
            f"{len(rows):,} images of {kind}, central crop {self.size}",
            "details": {"input": facts["input"], "run": str(self.folder)}
            | self.report.get("facts", {}),
            "seconds": {"training": round(time.monotonic() - self._began, 1)},
            "suffix": self.report.get("suffix"),
            "image_size": self.size,
        }
        folder = Path(self.report.get("folder") or self.folder / "evals")
        reporting.write_result(folder, content, say=print)

    # ---------------------------------------------------------------------------------- images

    def _images(self, source: Source, keep: bool) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Batches (images, labels, rows) of this rank's share."""
        if keep and self._kept is not None:
            yield from self._kept
            return
        ranks, rank = collectives.size(), collectives.rank()
        own = range(rank, len(source), ranks)
        size = self.size * self.size * self.pixels.channels * self.pixels.bits // 8
        kept: list[tuple[Tensor, Tensor, list[int]]] | None = []
        for start in range(0, len(own), self.batch_size):
            rows = list(own[start : start + self.batch_size])
            images, labels, bad = read_images(
                source, rows, size=self.size, limits=self.limits, pixels=self.pixels
            )
            gone = {failure.position for failure in bad}
            batch = (images, labels, [row for row in rows if row not in gone])
            if kept is not None and len(own) * size <= KEPT_BYTES:
                kept.append(batch)
            yield batch
        if keep and len(own) * size <= KEPT_BYTES:
            self._kept = kept

    @torch.no_grad()
    def _scores(
        self, method: Method, batches: Iterator[tuple[Tensor, Tensor, list[int]]]
    ) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """Scores (n, classes) by input, labels (n,) and rows of all ranks, in the order of rows."""
        parts: dict[str, list[Tensor]] = {}
        labels, rows = [], []
        for images, own, indices in batches:
            if len(images):
                for name, values in self._one(method, images).items():
                    parts.setdefault(name, []).append(values.cpu())
            labels.append(own)
            rows += indices
        order = torch.tensor(rows, dtype=torch.int64)
        gathered = collectives.all_gather_ragged_rows(order).argsort()
        every = collectives.all_gather_ragged_rows(order)[gathered]
        found = {
            name: collectives.all_gather_ragged_rows(torch.cat(values))[gathered]
            for name, values in parts.items()
        }
        if not found:
            raise ValueError("no image to evaluate on could be read: look at the data")
        targets = collectives.all_gather_ragged_rows(torch.cat(labels))[gathered]
        return found, targets, every.tolist()

    def _one(self, method: Method, images: Tensor | None = None) -> dict[str, Tensor]:
        classify: Any = getattr(method, "classify", None)
        if classify is None:
            raise ValueError(
                "eval.kind=classifier needs a method that classifies: method=supervised"
            )
        if images is None:
            images = torch.zeros(1, self.pixels.channels, self.size, self.size, dtype=torch.uint8)
            with evaluating(method):
                return classify(images.to(self.device))
        with self.autocast():
            return classify(images.to(self.device))

    def _warm(self, method: Method) -> None:
        assert self.val is not None
        for images, _, _ in self._images(self.val, keep=True):
            self._one(method, images)
