"""RegNetY trunks, from 200 MF to the 10 billion parameters of SEER.

"Designing Network Design Spaces" (Radosavovic et al. 2020) has the sizes up to 32GF; larger ones
are from "Self-supervised Pretraining of Visual Features in the Wild" (SEER, Goyal et al. 2021) and
"Vision Models Are More Robust And Fair When Pretrained On Uncurated Images Without Supervision"
(Goyal et al. 2022). The blocks are torchvision's, and so are the names in `state_dict()`, which
lacks only `fc.*`. Differences from `torchvision.models.regnet.RegNet`:

- stage widths come from `geometry.py`: they are the published ones for 800MF and 8GF too, and the
  trunk can be built on the meta device;
- there is no classifier; the output is the average of the last feature map;
- stem and first stage may keep the resolution, for small images.
"""

import math
from collections import OrderedDict
from functools import partial
from typing import cast, final

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.regnet import AnyStage, ResBottleneckBlock
from torchvision.ops.misc import Conv2dNormActivation

from selfsight.trunks.geometry import regnet_geometry
from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk


class _PaddedConvolution(nn.Conv2d):
    """A grouped convolution that runs with each group filled up with zeros to a multiple.

    What it gives, its gradients, parameters and their names are those of the plain convolution;
    only the kernel that computes it is another one, for channels in a group that suit the hardware.
    """

    multiple: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        groups, group = self.groups, self.in_channels // self.groups
        more = -group % self.multiple
        x = F.pad(input.unflatten(1, (groups, group)), (0, 0, 0, 0, 0, more)).flatten(1, 2)
        weight = self.weight.unflatten(0, (groups, group))
        weight = F.pad(weight, (0, 0, 0, 0, 0, more, 0, more)).flatten(0, 1)
        x = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)
        return x.unflatten(1, (groups, group + more))[:, :, :group].flatten(1, 2)


@final
class RegNetY(Trunk):
    """A RegNet with squeeze-and-excitation.

    Args:
        depth: number of residual blocks.
        w_0: width of the first block, a multiple of 8.
        w_a: slope of the block widths.
        w_m: ratio of the widths of neighbouring stages.
        group_width: channels in a group of the 3x3 convolutions.
        in_channels: channels of an image.
        stem_width: output channels of the stem.
        stem_stride: 2, or 1 for images of about 32 pixels.
        first_stage_stride: stride of stage 1: 2, or 1 to keep the stem's resolution. With both
            strides at 1 the last map of a 32-pixel image has 4x4 positions, with both at 2 one.
        se_ratio: channels inside squeeze-and-excitation, as a share of the block's input channels.
        bn_eps: added to BatchNorm's variance.
        bn_momentum: weight of a new batch in BatchNorm's running statistics.
        pad_groups: compute the 3x3 convolutions with group_width filled up to a multiple of this
            (8: 373 channels as 376); null as they are. Results, weights and names are the same.

    Levels of `features()`: c2 to c5 are the outputs of stages 1 to 4, with strides 4, 8, 16, 32;
    each stride that is set to 1 halves all of them.

    Raises:
        ValueError: the geometry does not give four stages, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        depth: int,
        w_0: int,
        w_a: float,
        w_m: float,
        group_width: int,
        in_channels: int = 3,
        stem_width: int = 32,
        stem_stride: int = 2,
        first_stage_stride: int = 2,
        se_ratio: float = 0.25,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        pad_groups: int | None = None,
    ) -> None:
        super().__init__()
        for name, stride in (("stem", stem_stride), ("first_stage", first_stage_stride)):
            if stride not in (1, 2):
                raise ValueError(f"{name}_stride of a RegNetY must be 1 or 2, not {stride}.")
        if not 0 < se_ratio <= 1:
            raise ValueError(f"se_ratio of a RegNetY must be in (0, 1], not {se_ratio}.")
        if pad_groups is not None and pad_groups < 1:
            raise ValueError(f"pad_groups={pad_groups} of a RegNetY must be at least 1, or null.")
        geometry = regnet_geometry(depth=depth, w_0=w_0, w_a=w_a, w_m=w_m, group_width=group_width)
        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)

        self.stem = Conv2dNormActivation(
            in_channels, stem_width, kernel_size=3, stride=stem_stride, norm_layer=norm
        )
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        feature_info: dict[str, FeatureLevel] = {}
        width_in, reduction = stem_width, stem_stride
        for stage, (stage_depth, width, stage_group_width, level) in enumerate(
            zip(geometry.depths, geometry.widths, geometry.group_widths, LEVELS, strict=True),
            start=1,
        ):
            stride = first_stage_stride if stage == 1 else 2
            stages[f"block{stage}"] = AnyStage(
                width_in,
                width,
                stride,
                stage_depth,
                ResBottleneckBlock,
                norm,
                nn.ReLU,
                stage_group_width,
                bottleneck_multiplier=1.0,
                se_ratio=se_ratio,
                stage_index=stage,
            )
            width_in, reduction = width, reduction * stride
            feature_info[level] = FeatureLevel(channels=width, stride=reduction)
        self.trunk_output = nn.Sequential(stages)
        for conv in self.trunk_output.modules() if pad_groups else ():
            if isinstance(conv, nn.Conv2d) and conv.groups > 1:
                conv.__class__ = _PaddedConvolution
                cast(_PaddedConvolution, conv).multiple = pad_groups
        self.width = width_in
        self.feature_info = feature_info
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Return the average of the last feature map: (b, channels, h, w) to (b, width)."""
        return self.trunk_output(self.stem(images)).mean((2, 3))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of each stage: (b, 3, h, w) to c2, c3, c4, c5."""
        maps: dict[str, Tensor] = {}
        x = self.stem(images)
        for level, stage in zip(LEVELS, self.trunk_output, strict=True):
            x = stage(x)
            maps[level] = x
        return maps

    def units(self) -> list[nn.Module]:
        """Return the residual blocks, from all stages."""
        return [block for stage in self.trunk_output for block in stage.children()]

    def compile_units(self) -> list[nn.Module]:
        """Return the whole trunk: block by block it would exceed the recompile limit."""
        return [self]

    def init_weights(self) -> None:
        """Initialise as pycls, ClassyVision and torchvision do.

        Convolutions from N(0, 2 / (k * k * outputs)), the outputs not divided by the groups;
        BatchNorm 1 and 0, the last one of a block too; the biases of squeeze-and-excitation
        uniform, as in a new `nn.Conv2d`.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                std = math.sqrt(2.0 / (area * module.out_channels))
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    bound = 1 / math.sqrt(area * module.in_channels / module.groups)
                    nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
