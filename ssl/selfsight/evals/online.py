"""Evaluation inside a run: k-NN on a labelled split, or rank and uniformity where nothing is
labelled. Images are read once and kept as uint8."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from selfsight.data.decode import DecodeLimits
from selfsight.data.evaluation import read_images
from selfsight.data.pixels import PixelFormat
from selfsight.data.sources.source import Source
from selfsight.evals.features import extract
from selfsight.evals.knn import knn_top1
from selfsight.evals.spread import rankme, uniformity
from selfsight.methods.method import Method

CALIBRATION_IMAGES = 1024


class OnlineEvaluation:
    """Evaluates the trunk during pretraining.

    Args:
        source: The training images. Where no labelled split is given, but these have labels, a
            fifth of them is classified among the rest; where they have none, rank and uniformity
            of their features stand in.
        bank: Labelled images whose features vote, or None.
        queries: Labelled images to classify, or None.
        size: Side of the square images, pixels.
        limit: Most images of the bank and of the queries; evenly spaced ones are taken.
    """

    def __init__(
        self,
        *,
        source: Source,
        bank: Source | None,
        queries: Source | None,
        size: int,
        limit: tuple[int, int],
        neighbours: int,
        temperature: float,
        batch_size: int,
        limits: DecodeLimits,
        pixels: PixelFormat,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.neighbours, self.temperature = neighbours, temperature
        self.batch_size, self.device, self.autocast = batch_size, device, autocast
        images, answers = limit
        if bank is not None and queries is not None:
            parts = [(bank, _spaced(len(bank), images)), (queries, _spaced(len(queries), answers))]
        elif source.classes is not None and len(source.classes) > 1 and len(source) > 4:
            asked = _spaced(len(source), min(answers, len(source) // 5))
            rest = sorted(set(range(len(source))) - set(asked))
            parts = [(source, [rest[i] for i in _spaced(len(rest), images)]), (source, asked)]
        else:
            some = source.excerpt(answers)
            parts = [(some, list(range(len(some))))]
        self.labelled = len(parts) == 2
        read = partial(_read, size=size, limits=limits, pixels=pixels)
        self.features: Tensor | None = None  # of the bank, as last extracted
        self.bank, self.bank_labels = read(*parts[0])
        if self.labelled:
            self.queries, self.labels = read(*parts[1])
            if min(int(self.labels.min()), int(self.bank_labels.min())) < 0:
                raise ValueError(
                    f"{parts[1][0].name}: the split for k-NN has images without a label; set "
                    "data.eval_train=null data.eval_val=null for label-free figures instead"
                )

    @property
    def protocol(self) -> str:
        """What is measured, in words."""
        if self.labelled:
            return (
                f"k-NN (k={self.neighbours}, T={self.temperature}) of {len(self.queries)} images "
                f"among {len(self.bank)}"
            )
        return f"no labels: rank and uniformity of {len(self.bank)} images"

    def run(
        self, method: Method, *, calibrate: bool = False, last: bool = False, step: int = 0
    ) -> dict[str, float]:
        """Figures of the method's trunk; nothing of the method is changed.

        Args:
            calibrate: Estimate BatchNorm's running statistics on bank images first, for this
                evaluation only: a trunk fresh from its initialisation has none, and would be judged
                below its worth.
            last, step: for evaluations that keep the best of several states; this one does not.
        """
        with calibrated(method.trunk, self._forward(method)) if calibrate else evaluating(method):
            self.features = bank = self._extract(method, self.bank)
            if not self.labelled:
                return {"rank": rankme(bank), "uniformity": uniformity(bank)}
            queries = self._extract(method, self.queries)
        top1 = knn_top1(
            bank,
            self.bank_labels,
            queries,
            self.labels,
            neighbours=self.neighbours,
            temperature=self.temperature,
        )
        return {"knn_top1": top1, "rank": rankme(queries)}

    def _extract(self, method: Method, images: Tensor) -> Tensor:
        return extract(
            method.trunk,
            images,
            normalize=method.normalize_pixels,
            batch_size=self.batch_size,
            device=self.device,
            autocast=self.autocast,
        )

    def _forward(self, method: Method) -> Callable[[], object]:
        return lambda: self._extract(method, self.bank[:CALIBRATION_IMAGES])


def _spaced(length: int, limit: int) -> list[int]:
    """At most `limit` indices, evenly spaced."""
    count = min(limit, length)
    return [i * length // count for i in range(count)]


def _read(source: Source, indices: list[int], **how: Any) -> tuple[Tensor, Tensor]:
    images, labels, skipped = read_images(source, indices, **how)
    if len(images) < 2:
        raise ValueError(
            f"{source.name}: only {len(images)} of {len(indices)} images for evaluation can be "
            f"read ({skipped[0] if skipped else 'the source is empty'})"
        )
    return images, labels


@contextmanager
def evaluating(method: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode of every module after."""
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def calibrated(trunk: nn.Module, forward: Callable[[], object]) -> Iterator[None]:
    """Evaluation mode with BatchNorm statistics that `forward` has just estimated: averages over
    its batches. The former statistics are put back after."""
    kept = [(n, {k: b.clone() for k, b in n.named_buffers()}) for n in _norms(trunk)]
    with evaluating(trunk):
        calibrate(trunk, forward)
        try:
            yield
        finally:
            for norm, buffers in kept:
                for key, value in buffers.items():
                    norm.get_buffer(key).copy_(value)


def calibrate(trunk: nn.Module, forward: Callable[[], object]) -> None:
    """Set BatchNorm's running statistics to averages over the batches of `forward`; the trunk is
    in evaluation mode before and after."""
    norms = _norms(trunk)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.train()
    if norms:
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _norms(trunk: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
