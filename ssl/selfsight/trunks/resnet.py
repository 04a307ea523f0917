"""ResNet trunks: ResNet, wide ResNet and ResNeXt.

"Deep Residual Learning for Image Recognition" (He et al. 2016), with the stride in the 3x3
convolution of a bottleneck; "Aggregated Residual Transformations" (ResNeXt, Xie et al. 2017). The
blocks are torchvision's, and so are the names in `state_dict()`, which lacks only `fc.*`; SwAV's
files have them too. Differences from `torchvision.models.resnet.ResNet`:

- `widen` multiplies all widths, the stem's too, as SwAV's and SimCLR's wide ResNets do
  (torchvision's `wide_resnet50_2` widens only the 3x3 convolutions: `group_width: 128`);
- there is no classifier; the output is the average of the last feature map;
- the stem may keep the resolution, for small images.
"""

from collections.abc import Sequence
from functools import partial
from typing import final

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk

_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


def stage(
    block: str,
    width_in: int,
    planes: int,
    depth: int,
    stride: int,
    *,
    groups: int = 1,
    group_width: int = 64,
    norm: partial[nn.BatchNorm2d],
) -> nn.Sequential:
    """Return `depth` residual blocks, the first of which has the stride.

    (b, width_in, h, w) to (b, planes * expansion, ceil(h / stride), ceil(w / stride)), the
    expansion being 4 for `bottleneck` and 1 for `basic`.
    """
    kind = _BLOCKS[block]
    width = planes * kind.expansion
    shortcut: nn.Module | None = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width))
    more = {"groups": groups, "base_width": group_width, "norm_layer": norm}
    blocks = [kind(width_in, planes, stride, shortcut, **more)]
    blocks += [kind(width, planes, **more) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def init_convolutions(module: nn.Module) -> None:
    """Initialise convolutions from N(0, 2 / (k * k * outputs)) and BatchNorm with 1 and 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.reset_parameters()


@final
class ResNet(Trunk):
    """A residual network.

    Args:
        block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1).
        depths: number of blocks of each of the four stages.
        widen: factor of all widths: 2 for ResNet-50w2.
        groups: groups of the 3x3 convolutions: 32 for ResNeXt.
        group_width: channels of a group in the first stage, for groups=1 of the whole convolution:
            4 or 8 for ResNeXt.
        in_channels: channels of an image.
        small_images: a 3x3 stem of stride 1 without pooling, for images of about 32 pixels ("A
            Simple Framework for Contrastive Learning", Chen et al. 2020, appendix B.9).
        zero_init: the last BatchNorm of each block begins with 0, so that blocks begin as identity.
        bn_eps: added to BatchNorm's variance.
        bn_momentum: weight of a new batch in BatchNorm's running statistics.

    Levels of `features()`: c2 to c5 are the outputs of the four stages, with strides 4, 8, 16, 32;
    small_images divides them by 4.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        block: str,
        depths: Sequence[int],
        widen: int = 1,
        groups: int = 1,
        group_width: int = 64,
        in_channels: int = 3,
        small_images: bool = False,
        zero_init: bool = False,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if block not in _BLOCKS:
            raise ValueError(f"block of a ResNet must be basic or bottleneck, not {block}.")
        if len(depths) != len(LEVELS) or min(depths) < 1:
            raise ValueError(f"depths of a ResNet must be four numbers above 0, not {depths}.")
        if widen < 1:
            raise ValueError(f"widen={widen} of a ResNet must be at least 1.")
        if block == "basic" and (groups != 1 or group_width != 64):
            raise ValueError("groups and group_width of a ResNet need block=bottleneck.")
        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        self.zero_init = zero_init
        width, reduction = 64 * widen, 1 if small_images else 4
        size, stride, padding = (3, 1, 1) if small_images else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, width, size, stride, padding, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        feature_info: dict[str, FeatureLevel] = {}
        for number, (depth, level) in enumerate(zip(depths, LEVELS, strict=True), start=1):
            planes, stride = 64 * widen * 2 ** (number - 1), 1 if number == 1 else 2
            layer = stage(
                block,
                width,
                planes,
                depth,
                stride,
                groups=groups,
                group_width=group_width,
                norm=norm,
            )
            self.add_module(f"layer{number}", layer)
            width, reduction = planes * _BLOCKS[block].expansion, reduction * stride
            feature_info[level] = FeatureLevel(channels=width, stride=reduction)
        self.width = width
        self.feature_info = feature_info
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Return the average of the last feature map: (b, channels, h, w) to (b, width)."""
        x = self._stem(images)
        for layer in self._layers():
            x = layer(x)
        return x.mean((2, 3))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of each stage: (b, channels, h, w) to c2, c3, c4, c5."""
        maps: dict[str, Tensor] = {}
        x = self._stem(images)
        for level, layer in zip(LEVELS, self._layers(), strict=True):
            x = layer(x)
            maps[level] = x
        return maps

    def units(self) -> list[nn.Module]:
        """Return the residual blocks, from all stages."""
        return [block for layer in self._layers() for block in layer.children()]

    def compile_units(self) -> list[nn.Module]:
        """Return the whole trunk: block by block it would exceed the recompile limit."""
        return [self]

    def init_weights(self) -> None:
        """Initialise as torchvision and SwAV do."""
        init_convolutions(self)
        if self.zero_init:
            for block in self.units():
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                assert isinstance(last, nn.Module)
                nn.init.zeros_(last.get_parameter("weight"))

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def _layers(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{number}") for number in range(1, len(LEVELS) + 1)]
