"""The contract that every image trunk keeps.

A trunk turns a batch of images into one feature vector an image (what heads, k-NN and linear probes
take) and, on request, into four feature maps of falling resolution (what detectors and multi-level
probes take). It is written for one device: SyncBN, activation checkpointing, compilation and
sharding are applied from outside, by `distributed/parallelize.py`, to the modules that the trunk
names. Classes are abstract (this one) or final (all others).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

# Names of the four levels of `features()`, coarse last. They are those of "Feature Pyramid Networks
# for Object Detection" (Lin et al. 2017): level cN has stride 2**N. VISSL calls them res2 to res5.
LEVELS = ("c2", "c3", "c4", "c5")


@dataclass(frozen=True)
class FeatureLevel:
    """Shape of one level of `features()`.

    `channels` is the number of channels; `stride` is the distance, in pixels of the input image,
    between neighbouring positions of the map.
    """

    channels: int
    stride: int


class Trunk(nn.Module, ABC):
    """Base of all trunks.

    Attributes:
        width: length of the feature vector that `forward` returns.
        feature_info: for each level of `features()`, by name and finest first, its channels and
            stride.

    `forward` and `features` call the blocks of `units()` as ordinary modules, and look them up at
    every call, so that a caller may replace a block in its parent or patch its `forward`.
    """

    width: int
    feature_info: Mapping[str, FeatureLevel]
    batch_norm_frozen = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return one feature vector an image: (b, 3, h, w) floats to (b, width).

        Images are normalised and in either memory format, contiguous or channels-last.
        """

    def forward_views(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return the feature vectors of image batches of several sizes.

        (b_i, 3, s_i, s_i) to (b_i, width) for each; a trunk may do all in one pass.
        """
        return [self(view) for view in views]

    @abstractmethod
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of (b, 3, h, w) images, by level name, finest first.

        Level `n` has shape (b, channels, ceil(h / stride), ceil(w / stride)) with the channels and
        stride of `feature_info[n]`. Nothing is pooled over the image.
        """

    def freeze_batch_norm(self) -> None:
        """Leave BatchNorm as it is from now on, as detectors do: it normalises by its running
        averages, in training too, and neither they nor its factors change."""
        self.batch_norm_frozen = True
        for norm in _batch_norms(self):
            norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; a frozen BatchNorm stays in evaluation."""
        super().train(mode)
        for norm in _batch_norms(self) if self.batch_norm_frozen else ():
            norm.eval()
        return self

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Return the blocks, in the order in which they run.

        Activation checkpointing recomputes each of them; FSDP2 shards each of them as one group.
        Parameters outside the blocks (stem, embeddings, last norm) belong to the trunk itself.
        """

    @abstractmethod
    def compile_units(self) -> list[nn.Module]:
        """Return the modules to compile, each as one graph for every crop size."""

    @abstractmethod
    def init_weights(self) -> None:
        """Initialise all parameters and buffers in place.

        The constructor has called it already. It is needed again after a trunk built on the meta
        device has been given memory with `to_empty`, and it uses the global random generator.
        """


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
