"""Sizes of ResNets and Visual Transformers in plain Python: parameters and multiply-adds.

As in `geometry.py`, without torch. `resnet.py` and `visual_transformer.py` build what is counted.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_EXPANSION = {"basic": 1, "bottleneck": 4}
_POSITIONS = 14


class _Layer(NamedTuple):
    """A convolution with BatchNorm: weights, output channels, and output positions: `reduction` is
    the stride with respect to the image, or 0 where there are `positions` whatever the image."""

    weights: int
    outputs: int
    reduction: int
    positions: int = 0


def _residual_layers(
    block: str,
    depths: Sequence[int],
    *,
    widen: int = 1,
    groups: int = 1,
    group_width: int = 64,
    in_channels: int = 3,
    small_images: bool = False,
) -> Iterator[_Layer]:
    """The layers of a stem and of as many stages as there are depths."""
    width, reduction = 64 * widen, 1 if small_images else 2
    yield _Layer((9 if small_images else 49) * in_channels * width, width, reduction)
    reduction = 1 if small_images else 4
    for stage, depth in enumerate(depths):
        planes = 64 * widen * 2**stage
        for index in range(depth):
            before, out = reduction, planes * _EXPANSION[block]
            reduction *= 2 if stage and not index else 1
            if block == "basic":
                yield _Layer(9 * width * planes, planes, reduction)
                yield _Layer(9 * planes * planes, planes, reduction)
            else:
                inner = planes * group_width // 64 * groups
                yield _Layer(width * inner, inner, before)
                yield _Layer(9 * inner * inner // groups, inner, reduction)
                yield _Layer(inner * out, out, reduction)
            if not index and (width != out or stage):
                yield _Layer(width * out, out, reduction)
            width = out


def _vt_layers(
    block: str,
    depths: Sequence[int],
    *,
    tokens: int = 8,
    token_width: int = 1024,
    map_width: int = 512,
    heads: int = 16,
    map_groups: int = 16,
    token_groups: int = 8,
    last_projector: bool = False,
    in_channels: int = 3,
) -> Iterator[_Layer]:
    yield from _residual_layers(block, depths[:3], in_channels=in_channels)
    last, c, t = 256 * _EXPANSION[block], map_width, token_width
    grouped = _Layer(c * c // map_groups, c, 16)
    places = (_POSITIONS // 2) ** 2
    if last != c:
        yield _Layer(last * c, c, 16)
    for module in range(depths[3]):
        if module:
            yield _Layer(t * c, c, 0, tokens)
            yield grouped
        else:
            yield _Layer(c * tokens, tokens, 16)
        yield grouped
        yield _Layer(9, 1, 0, tokens * places)
        yield _Layer(places**2, places, 0, tokens)
        yield _Layer((c + places) * t, t, 0, tokens)
        for width in (t // 2, t // 2, t):
            yield _Layer(t * width // token_groups, width, 0, tokens)
        yield from [_Layer(t * t, t, 0, tokens)] * 2
        if last_projector or module < depths[3] - 1:
            yield grouped
            yield from [_Layer(t * c, c, 0, tokens)] * 2


def _parameters(layers: Iterator[_Layer]) -> int:
    return sum(layer.weights + 2 * layer.outputs for layer in layers)


def _macs(layers: Iterator[_Layer], height: int, width: int) -> int:
    return sum(
        layer.weights
        * (
            -(-height // layer.reduction) * -(-width // layer.reduction)
            if layer.reduction
            else layer.positions
        )
        for layer in layers
    )


_RESNET = ("widen", "groups", "group_width", "in_channels", "small_images")
_VT = (
    "tokens", "token_width", "map_width", "heads", "map_groups", "token_groups", "last_projector",
    "in_channels",
)  # fmt: skip


def _only(names: Sequence[str], trunk: dict[str, Any]) -> dict[str, Any]:
    return {name: trunk[name] for name in names if name in trunk}


def resnet_parameters(*, block: str, depths: Sequence[int], **trunk: Any) -> int:
    """Return the number of parameters of `ResNet` with these arguments, no classifier.

    Arguments that change no size are ignored.
    """
    return _parameters(_residual_layers(block, depths, **_only(_RESNET, trunk)))


def resnet_macs(height: int, width: int, *, block: str, depths: Sequence[int], **trunk: Any) -> int:
    """Return the multiply-adds of `ResNet` on one image of height x width pixels: convolutions."""
    return _macs(_residual_layers(block, depths, **_only(_RESNET, trunk)), height, width)


def vt_parameters(*, block: str, depths: Sequence[int], **trunk: Any) -> int:
    """Return the number of parameters of `VisualTransformer` with these arguments."""
    return _parameters(_vt_layers(block, depths, **_only(_VT, trunk)))


def vt_macs(height: int, width: int, *, block: str, depths: Sequence[int], **trunk: Any) -> int:
    """Return the multiply-adds of `VisualTransformer` on one image.

    Convolutions and the products of attention; the resampling of positions is not counted.
    """
    sizes = _only(_VT, trunk)
    tokens, t = sizes.get("tokens", 8), sizes.get("token_width", 1024)
    c = sizes.get("map_width", 512)
    places = -(-height // 16) * -(-width // 16)
    pooling = places * tokens * c
    recurrent = places * tokens * c  # scores of tokens with pixels
    attention = tokens**2 * (t // 2 + t)
    projection = 2 * places * tokens * c * (depths[3] - (not sizes.get("last_projector", False)))
    products = depths[3] * (pooling + attention) + (depths[3] - 1) * recurrent + projection
    return _macs(_vt_layers(block, depths, **sizes), height, width) + products
