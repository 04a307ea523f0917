"""Sizes of RegNets and ViTs in plain Python: widths, parameters, multiply-adds.

Neither torch nor numpy is imported here, so that a configuration can show the exact size of a trunk
without building it. `regnet.py` and `vit.py` build what is counted here.

RegNet: "Designing Network Design Spaces" (Radosavovic et al. 2020), section 3.3 and appendix A. The
widths of the blocks follow w_0 + w_a * i, are rounded to w_0 * w_m**k in log space, then to
multiples of 8. To let groups of a fixed width fit, each stage's width is then rounded to the
*nearest* multiple of the group width, as pycls, ClassyVision (SEER) and timm do. torchvision rounds
up wherever the nearest multiple is below 90 % of the width, so two of its RegNetY models are wider
than published: 800MF has 144 and 784 channels in stages 2 and 4 instead of 128 and 768, 8GF has 224
in stage 1 instead of 168.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

_QUANTUM = 8  # block widths are multiples of this, appendix A of the paper
_STAGES = 4


@dataclass(frozen=True)
class RegNetGeometry:
    """Depth, width and group width (channels in a group) of each of the four stages."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_widths: tuple[int, ...]


class _Convolution(NamedTuple):
    """What parameters and multiply-adds depend on.

    `fan_in` is kernel area times input channels in a group; `reduction` is the stride of the output
    with respect to the image, or 0 where the input was averaged over the whole image.
    """

    fan_in: int
    outputs: int
    reduction: int
    batch_norm: bool  # otherwise a bias


def regnet_geometry(
    *, depth: int, w_0: int, w_a: float, w_m: float, group_width: int
) -> RegNetGeometry:
    """Return the stages that the quantised linear rule gives.

    Args:
        depth: number of blocks.
        w_0: width of the first block, a multiple of 8.
        w_a: slope of the block widths, in channels a block.
        w_m: ratio of the widths of neighbouring stages, before rounding.
        group_width: channels in a group of the 3x3 convolutions; narrower stages use one group.

    Raises:
        ValueError: the numbers are outside the rule, or do not give four stages.
    """
    if depth < 1 or group_width < 1:
        raise ValueError(
            f"A RegNet needs depth and group_width of at least 1, not depth={depth} and "
            f"group_width={group_width}."
        )
    if w_a < 0 or w_0 <= 0 or w_m <= 1 or w_0 % _QUANTUM:
        raise ValueError(
            f"A RegNet needs w_a >= 0, w_m > 1 and w_0 a positive multiple of {_QUANTUM}, not "
            f"w_a={w_a}, w_m={w_m} and w_0={w_0}."
        )
    block_widths = []
    for i in range(depth):
        capacity = round(math.log((w_0 + w_a * i) / w_0) / math.log(w_m))
        block_widths.append(round(w_0 * w_m**capacity / _QUANTUM) * _QUANTUM)
    stages = [(width, len(list(blocks))) for width, blocks in groupby(block_widths)]
    if len(stages) != _STAGES:
        raise ValueError(
            f"depth={depth}, w_0={w_0}, w_a={w_a} and w_m={w_m} give {len(stages)} stages with "
            f"widths {[width for width, _ in stages]}; choose numbers that give {_STAGES}."
        )
    group_widths = [min(group_width, width) for width, _ in stages]
    return RegNetGeometry(
        depths=tuple(count for _, count in stages),
        widths=tuple(
            round(width / group) * group
            for (width, _), group in zip(stages, group_widths, strict=True)
        ),
        group_widths=tuple(group_widths),
    )


def _regnety_convolutions(
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
    **_: Any,
) -> Iterator[_Convolution]:
    """List the convolutions of a RegNetY; they hold all of its parameters but BatchNorm's."""
    geometry = regnet_geometry(depth=depth, w_0=w_0, w_a=w_a, w_m=w_m, group_width=group_width)
    reduction = stem_stride
    yield _Convolution(9 * in_channels, stem_width, reduction, True)
    w_in = stem_width
    stages = zip(geometry.depths, geometry.widths, geometry.group_widths, strict=True)
    for stage, (stage_depth, width, group) in enumerate(stages):
        for block in range(stage_depth):
            stride = 1 if block else (2 if stage else first_stage_stride)
            yield _Convolution(w_in, width, reduction, True)  # a
            reduction *= stride
            yield _Convolution(9 * group, width, reduction, True)  # b
            squeezed = round(se_ratio * w_in)
            yield _Convolution(width, squeezed, 0, False)  # se.fc1
            yield _Convolution(squeezed, width, 0, False)  # se.fc2
            yield _Convolution(width, width, reduction, True)  # c
            if w_in != width or stride != 1:
                yield _Convolution(w_in, width, reduction, True)  # proj
            w_in = width


def regnety_parameters(**trunk: Any) -> int:
    """Return the number of parameters of `RegNetY(**trunk)`: stem and four stages, no classifier.

    A convolution has fan_in * outputs weights, and its BatchNorm 2 * outputs more, or, inside
    squeeze-and-excitation, its bias outputs more. Arguments that change no size are ignored.
    """
    return sum(
        conv.outputs * (conv.fan_in + (2 if conv.batch_norm else 1))
        for conv in _regnety_convolutions(**trunk)
    )


def regnety_macs(height: int, width: int, **trunk: Any) -> int:
    """Return the multiply-adds of `RegNetY(**trunk)` on one image of height x width pixels.

    Convolutions only, as papers count; a training step costs about three times as much.
    """
    return sum(
        conv.fan_in
        * conv.outputs
        * (_ceil(height, conv.reduction) * _ceil(width, conv.reduction) if conv.reduction else 1)
        for conv in _regnety_convolutions(**trunk)
    )


def _ceil(size: int, reduction: int) -> int:
    return -(-size // reduction)


def vit_parameters(
    *,
    width: int,
    depth: int,
    in_channels: int = 3,
    image_size: int = 224,
    patch_size: int = 16,
    mlp_ratio: float = 4.0,
    mlp: str = "gelu",
    layer_scale: float | None = None,
    register_tokens: int = 0,
    mask_token: bool = False,
    **_: Any,
) -> int:
    """Return the number of parameters of `VisionTransformer` with these arguments, no classifier.

    Arguments that change no size are ignored.
    """
    patches = (image_size // patch_size) ** 2
    embedding = (in_channels * patch_size**2 + 1) * width  # and bias
    tokens = width * (1 + register_tokens + mask_token) + (1 + patches) * width  # and positions
    attention = (width + 1) * 3 * width + (width + 1) * width  # qkv, projection
    hidden, first = _mlp_widths(width, mlp_ratio, mlp)
    layers = (width + 1) * first + (hidden + 1) * width
    norm = 2 * width
    scales = 0 if layer_scale is None else 2 * width
    return embedding + tokens + depth * (attention + layers + 2 * norm + scales) + norm


def vit_macs(
    image_height: int,
    image_width: int,
    *,
    width: int,
    depth: int,
    in_channels: int = 3,
    patch_size: int = 16,
    mlp_ratio: float = 4.0,
    mlp: str = "gelu",
    register_tokens: int = 0,
    **_: Any,
) -> int:
    """Return the multiply-adds of `VisionTransformer` on one image of the given pixels.

    Linear layers and the two products of attention (scores, weighted values).
    """
    patches = (image_height // patch_size) * (image_width // patch_size)
    tokens = patches + 1 + register_tokens
    hidden, first = _mlp_widths(width, mlp_ratio, mlp)
    linear = 4 * width**2 + width * (first + hidden)
    embedding = in_channels * patch_size**2 * width * patches
    return embedding + depth * (tokens * linear + 2 * tokens**2 * width)


def _mlp_widths(width: int, mlp_ratio: float, mlp: str) -> tuple[int, int]:
    """Return the hidden width of an MLP and the outputs of its first layer, twice that if gated."""
    hidden = int(width * mlp_ratio)
    if mlp != "swiglu":
        return hidden, hidden
    hidden = gated_width(hidden)
    return hidden, 2 * hidden


def gated_width(hidden: int) -> int:
    """Return the hidden width of a gated MLP that stands for a plain one of `hidden`.

    Two thirds, rounded up to a multiple of 8, as in DINOv2: about as many parameters.
    """
    return (int(hidden * 2 / 3) + 7) // 8 * 8
