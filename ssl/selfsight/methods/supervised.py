"""Supervised training on the same loop: fine-tuning, probes on random crops, and from scratch.

Fine-tuning takes a trunk's weights from a file; `freeze` keeps what its patterns name as it is, so
that a frozen trunk under classifiers on several of its levels is the linear probe of VISSL and
SEER. Nothing is taken from a file for training from scratch.

Shapes: V views of one size, b samples, C classes.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import v2

from selfsight.data.batch import Batch
from selfsight.distributed import checkpoint
from selfsight.heads.classifier import Classifiers, LinearClassifier
from selfsight.losses.mixing import cutmix, mixup, soft_labels
from selfsight.methods.method import Method, Now, Verdict
from selfsight.trunks.trunk import Trunk
from selfsight.trunks.vectors import check, vectors, width_of

AUGMENTATIONS = ("autoaugment", "randaugment")


class Supervised(Method):
    """Cross-entropy of labels.

    Args:
        trunk: gives the vectors that classifiers see.
        classes: number of them; the loop puts in those of the data for "auto".
        weights: file with the trunk's weights, as a run exports them; None: as initialised.
        head_checkpoint: folder of a run, the first layer of whose pretraining head is kept and
            trained on; None: classifiers are linear.
        freeze: regular expressions; parameters whose names they match (`trunk.stem.0.weight`) stay
            as they are, and BatchNorm of which every parameter is frozen uses its running
            statistics.
        inputs: vectors of the trunk (`selfsight.trunks.vectors`), a classifier on each.
        batch_norm: BatchNorm before each linear layer.
        dropout: before it.
        label_smoothing: share of a label given to all classes alike.
        mixup, cutmix: parameter of the Beta distribution, 0 for none; of both, one is drawn for each
            batch with even chances.
        augment: "autoaugment", "randaugment" or None, on the crops.
        average: decay of a moving average of the weights, which is then evaluated; None: none.

    Raises:
        ValueError: an argument that cannot be, a pattern that names nothing, or weights that do not
            fit.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        classes: int | str = "auto",
        weights: str | None = None,
        head_checkpoint: str | None = None,
        freeze: Sequence[str] = (),
        inputs: Sequence[str] = ("feature",),
        batch_norm: bool = False,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        augment: str | None = None,
        average: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise ValueError(f"method.classes={classes} must be a number of at least 2")
        if augment not in (None, *AUGMENTATIONS):
            raise ValueError(f"method.augment={augment!r} is not autoaugment, randaugment or null")
        if not (0 <= label_smoothing < 1 and 0 <= dropout < 1 and min(mixup, cutmix) >= 0):
            raise ValueError(
                "method.label_smoothing and method.dropout must be from 0 to below 1, "
                "method.mixup and method.cutmix not negative"
            )
        if average is not None and not 0 < average < 1:
            raise ValueError(f"method.average={average} must be between 0 and 1, or null")
        check(trunk, inputs)
        self.classes = classes
        self.inputs = list(inputs)
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.decay = average
        kept = None if head_checkpoint is None else _first_layer(head_checkpoint)
        heads = {}
        for name in self.inputs:
            first = kept if name == "feature" else None
            heads[name] = LinearClassifier(
                width_of(trunk, name),
                classes,
                batch_norm=batch_norm,
                dropout=dropout,
                hidden=None if first is None else len(first["0.weight"]),
                hidden_norm=first is not None and "1.weight" in first,
            )
            if first is not None:
                _load(heads[name].hidden, first, f"the head of {head_checkpoint}")
        classifiers = Classifiers(heads)
        if weights is not None:
            _load(trunk, _read(weights), weights)
        self.trained_trunk = self.trained_classifiers = None
        if average is not None:
            self.trained_trunk, self.trained_classifiers = trunk, classifiers
            trunk, classifiers = copy.deepcopy(trunk), copy.deepcopy(classifiers)
            for parameter in [*trunk.parameters(), *classifiers.parameters()]:
                parameter.requires_grad_(False)
        self.trunk, self.classifiers = trunk, classifiers
        self._freeze(freeze)
        self._augment: Any = None
        if augment is not None:
            self._augment = v2.AutoAugment() if augment == "autoaugment" else v2.RandAugment()

    # --------------------------------------------------------------------------- what is trained

    @property
    def trainable_trunk(self) -> Trunk:
        return self.trunk if self.trained_trunk is None else self.trained_trunk

    @property
    def trainable_classifiers(self) -> Classifiers:
        return self.classifiers if self.trained_classifiers is None else self.trained_classifiers

    def units(self) -> list[nn.Module]:
        averaged = [] if self.trained_trunk is None else self.trunk.units()
        return [*self.trainable_trunk.units(), *averaged]

    def compile_units(self) -> list[nn.Module]:
        return self.trainable_trunk.compile_units()

    def _freeze(self, patterns: Sequence[str]) -> None:
        modules = {"trunk": self.trainable_trunk, "classifiers": self.trainable_classifiers}
        named = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        for pattern in patterns:
            try:
                found = [p for name, p in named.items() if re.search(pattern, name)]
            except re.error as error:
                raise ValueError(f"method.freeze: {pattern!r} is no pattern: {error}") from None
            if not found:
                some = ", ".join(list(named)[:3])
                raise ValueError(
                    f"method.freeze: {pattern!r} matches no parameter; their names are like {some}"
                )
            for parameter in found:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in named.values()):
            raise ValueError("method.freeze matches all parameters: nothing is left to train")
        trunk = list(self.trainable_trunk.parameters())
        self._trunk_frozen = not any(p.requires_grad for p in trunk)

    def train(self, mode: bool = True) -> "Supervised":
        """Training mode, but for what is frozen and what is averaged."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):
                module.training = False
                for child in module.modules():
                    child.training = False
        return self

    # ------------------------------------------------------------------------------- forward

    def forward(
        self, batch: Batch, now: Now, plan: None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = torch.cat([views.flatten(0, 1) for views in batch.views])
        views = sum(v.shape[0] for v in batch.views)
        labels = batch.labels.repeat(views)
        if self._augment is not None:
            # an image at a time: the operations are drawn for each
            images = torch.stack([self._augment(image) for image in images])
        inputs = self.normalize_pixels(images)
        targets = soft_labels(labels, self.classes, self.label_smoothing)
        both = self.mixup > 0 and self.cutmix > 0
        cuts = self.cutmix > 0 and (not both or torch.rand(()).item() < 0.5)
        if cuts:
            inputs, targets = cutmix(inputs, targets, self.cutmix)
        elif self.mixup > 0:
            inputs, targets = mixup(inputs, targets, self.mixup)
        with torch.set_grad_enabled(not self._trunk_frozen):
            found = vectors(self.trainable_trunk, inputs, self.inputs)
        scores = self.trainable_classifiers(found)
        losses = [F.cross_entropy(s.float(), targets) for s in scores.values()]
        first = next(iter(scores.values())).detach()
        correct = (first.argmax(1) == labels).float().mean()
        return torch.stack(losses).sum(), {"batch_accuracy": correct}

    @torch.no_grad()
    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """Scores (n, C) by each classifier, fp32, of uint8 images; in the mode it is in."""
        found = vectors(self.trunk, self.normalize_pixels(images), self.inputs)
        return {name: s.float() for name, s in self.classifiers(found).items()}

    @torch.no_grad()
    def after_step(self, now: Now, ok: Tensor) -> None:
        if self.trained_trunk is None or self.trained_classifiers is None:
            return
        assert self.decay is not None
        # young averages would consist of the initialisation
        decay = min(self.decay, (1 + now.step) / (10 + now.step))
        rate = torch.where(ok, 1 - decay, 0.0)
        pairs = ((self.trunk, self.trained_trunk), (self.classifiers, self.trained_classifiers))
        for average, trained in pairs:
            theirs = trained.state_dict()
            for name, own in average.state_dict().items():
                if own.is_floating_point():
                    own.add_((theirs[name] - own) * rate)
                else:
                    own.copy_(torch.where(ok, theirs[name], own))

    def diagnose(self, figures: Mapping[str, float], now: Now) -> Verdict:
        """`not learning` where the loss is not below that of knowing nothing."""
        nothing = len(self.inputs) * math.log(self.classes)
        loss = figures["loss"]
        if loss > 0.995 * nothing:
            return Verdict(
                "not learning",
                f"the loss {loss:.3f} is not below {nothing:.3f}, that of guessing",
                "try another schedule.base_lr, or look at the labels",
            )
        return Verdict("healthy", f"loss {loss:.3f} below {nothing:.3f}, that of guessing")


def _read(path: str) -> dict[str, Tensor]:
    try:
        return load_file(Path(path).expanduser())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"method.weights={path} cannot be read: {error}") from None


def _load(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a module, all of them or none; on the meta device only look at them."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if missing or surplus or shapes:
        what = [
            f"{len(names)} {text} ({names[0]})"
            for names, text in (
                (missing, "tensors are missing"),
                (surplus, "are not of this trunk"),
                (shapes, "have another shape"),
            )
            if names
        ]
        raise ValueError(f"{where} does not fit this trunk: {', '.join(what)}")
    if not any(p.is_meta for p in module.parameters()):
        module.load_state_dict(dict(weights))


def _first_layer(run: str) -> dict[str, Tensor]:
    """The first layer (and its BatchNorm) of the head in the newest checkpoint of a run."""
    prefix = "method/head.projection_head."
    newest = checkpoint.latest(Path(run).expanduser() / "checkpoints")
    if newest is None:
        raise ValueError(f"method.head_checkpoint={run} has no checkpoint")
    with checkpoint.Reader(newest, checked=True) as reader:
        names = [n for n in reader.shapes if n.startswith((f"{prefix}0.", f"{prefix}1."))]
        if f"{prefix}0.weight" not in names:
            raise ValueError(f"the checkpoint {newest} has no head whose first layer could be kept")
        found = {}
        for name in names:
            dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
            found[name.removeprefix(prefix)] = torch.empty(
                reader.shapes[name], dtype=dtype, device="cpu"
            )
            reader.fill(name, found[name.removeprefix(prefix)])
    return found
