"""Visual Transformers: ResNets whose last stage works on a few visual tokens.

"Visual Transformers: Token-based Image Representation and Processing for Computer Vision" (Wu et
al. 2020, https://arxiv.org/abs/2006.03677). Instead of stage 5 there is a module a block: it pools
pixels to L tokens (first by learned filters, from the second module on guided by the tokens of the
module before), relates the tokens with a transformer, and projects them back onto the map. The
average of the last tokens is the feature vector. Equations are numbered as in the paper.

Where the paper leaves things open, or its text and its appendix differ: the map is brought to
`map_width` channels by a 1x1 convolution; every convolution is followed by BatchNorm; a recurrent
tokenizer makes all L tokens anew (equation 2; the appendix keeps half); keys and queries have half
the width of a token, in groups; the MLP has two layers (equation 4; the appendix has one).

Shapes: b images, C channels of the map of h x w pixels, L tokens of T channels, H heads.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.trunks.resnet import init_convolutions, stage
from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk

_EXPANSION = {"basic": 1, "bottleneck": 4}
_POSITIONS = 14  # side of the map that token coefficients are resampled to
_NORM = partial(nn.BatchNorm2d)


class _Convolution(nn.Sequential):
    """A 1x1 convolution, in groups, of maps (b, C, h, w) or tokens (b, T, L), and BatchNorm."""

    def __init__(self, width_in: int, width: int, groups: int = 1, *, tokens: bool = False) -> None:
        kind, norm = (nn.Conv1d, nn.BatchNorm1d) if tokens else (nn.Conv2d, nn.BatchNorm2d)
        super().__init__(kind(width_in, width, 1, groups=groups, bias=False), norm(width))


def _split(x: Tensor, heads: int) -> Tensor:
    """(b, channels, ...) to (b, H, channels / H, positions)."""
    return x.flatten(2).unflatten(1, (heads, -1))


class _Positions(nn.Module):
    """Where each token looks: its coefficients as a small map, down-sampled and mixed."""

    def __init__(self) -> None:
        super().__init__()
        side = _POSITIONS // 2
        self.width = side**2
        self.down = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.BatchNorm2d(1))
        self.mix = _Convolution(self.width, self.width, tokens=True)

    def forward(self, coefficients: Tensor) -> Tensor:
        """(b, L, h, w), averaged over the heads, to (b, positions, L)."""
        h, w = coefficients.shape[-2:]
        rows, columns = self._resampling(h, coefficients), self._resampling(w, coefficients)
        maps = rows @ coefficients @ columns.T  # bilinear, and deterministic on GPUs
        small = self.down(maps.flatten(0, 1).unsqueeze(1))
        return self.mix(small.flatten(1).unflatten(0, coefficients.shape[:2]).transpose(1, 2))

    @staticmethod
    @torch.no_grad()
    def _resampling(size: int, like: Tensor) -> Tensor:
        """The (positions, size) weights of linear interpolation."""
        basis = torch.eye(size, device=like.device)[None]
        return F.interpolate(basis, _POSITIONS, mode="linear")[0].T.to(like.dtype)


class _Tokenizer(nn.Module):
    """Pool a map to tokens: by filters (equation 1), or guided by tokens (equation 2)."""

    def __init__(
        self, width: int, tokens: int, token_width: int, heads: int, groups: int, recurrent: bool
    ) -> None:
        super().__init__()
        self.heads, self.recurrent = heads, recurrent
        if recurrent:
            self.query = _Convolution(token_width, width, tokens=True)
            self.key = _Convolution(width, width, groups)
        else:
            self.filters = _Convolution(width, tokens)
        self.value = _Convolution(width, width, groups)
        self.positions = _Positions()
        self.token = _Convolution(width + self.positions.width, token_width, tokens=True)

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """(b, C, h, w), and (b, T, L) of the module before, to (b, T, L)."""
        if self.recurrent:
            query, key = _split(self.query(tokens), self.heads), _split(self.key(x), self.heads)
            scores = query.transpose(2, 3) @ key / math.sqrt(key.shape[2])  # (b, H, L, hw)
        else:
            scores = self.filters(x).flatten(2).unsqueeze(1) / math.sqrt(x.shape[1])
        coefficients = scores.softmax(-1)
        value = _split(self.value(x), self.heads)
        pooled = (value @ coefficients.transpose(2, 3)).flatten(1, 2)  # (b, C, L)
        where = coefficients.mean(1).unflatten(-1, x.shape[2:])
        return self.token(torch.cat((pooled, self.positions(where)), dim=1))


class _Transformer(nn.Module):
    """Relate the tokens: self-attention (equation 3) and an MLP (equation 4)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = _Convolution(width, width // 2, groups, tokens=True)
        self.query = _Convolution(width, width // 2, groups, tokens=True)
        self.value = _Convolution(width, width, groups, tokens=True)
        self.f1 = _Convolution(width, width, tokens=True)
        self.f2 = _Convolution(width, width, tokens=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, T, L) to (b, T, L)."""
        q, k, v = (
            _split(layer(tokens), self.heads) for layer in (self.query, self.key, self.value)
        )
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)  # (b, H, L, L)
        tokens = tokens + (v @ weights.transpose(2, 3)).flatten(1, 2)
        return tokens + self.f2(F.relu(self.f1(tokens)))


class _Projector(nn.Module):
    """Put what the tokens hold back onto the map (equation 5)."""

    def __init__(self, width: int, token_width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = _Convolution(width, width, groups)
        self.key = _Convolution(token_width, width, tokens=True)
        self.value = _Convolution(token_width, width, tokens=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(b, C, h, w) and (b, T, L) to (b, C, h, w)."""
        q = _split(self.query(x), self.heads)
        k, v = _split(self.key(tokens), self.heads), _split(self.value(tokens), self.heads)
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)  # (b, H, hw, L)
        return x + (v @ weights.transpose(2, 3)).flatten(1, 2).unflatten(2, x.shape[2:])


class VTModule(nn.Module):
    """Tokenizer, transformer and projector, on a map and the tokens of the module before."""

    def __init__(
        self,
        width: int,
        tokens: int,
        token_width: int,
        heads: int,
        map_groups: int,
        token_groups: int,
        recurrent: bool,
        projects: bool,
    ) -> None:
        super().__init__()
        self.tokenizer = _Tokenizer(width, tokens, token_width, heads, map_groups, recurrent)
        self.transformer = _Transformer(token_width, heads, token_groups)
        self.projector = _Projector(width, token_width, heads, map_groups) if projects else None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(b, C, h, w) and (b, T, L) to the same."""
        tokens = self.transformer(self.tokenizer(x, tokens))
        return x if self.projector is None else self.projector(x, tokens), tokens


@final
class VisualTransformer(Trunk):
    """A ResNet whose last stage is Visual Transformer modules.

    Args:
        block: `basic` or `bottleneck`, of the first three stages.
        depths: number of blocks of the first three stages, and of modules instead of the fourth.
        tokens: number L of visual tokens.
        token_width: channels of a token, and length of the feature vector.
        map_width: channels of the map that the modules work on.
        heads: attention heads.
        map_groups: groups of the convolutions that keep the map's width.
        token_groups: groups of the convolutions that make keys, queries and values of tokens.
        last_projector: put the last tokens back onto the map, for detectors. The feature
            vector does not need it, and without it c5 is the map that the last module read.
        in_channels: channels of an image.

    Levels of `features()`: c2 to c4 are the outputs of the first three stages; c5 is the map after
    the last module, whose stride is 16, averaged over 2x2 pixels to stride 32.

    Raises:
        ValueError: an argument is out of range or does not divide what it must.
    """

    def __init__(
        self,
        *,
        block: str,
        depths: Sequence[int],
        tokens: int = 8,
        token_width: int = 1024,
        map_width: int = 512,
        heads: int = 16,
        map_groups: int = 16,
        token_groups: int = 8,
        last_projector: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if block not in _EXPANSION:
            raise ValueError(f"block of a VT-ResNet must be basic or bottleneck, not {block}.")
        if len(depths) != len(LEVELS) or min(depths) < 1:
            raise ValueError(f"depths of a VT-ResNet must be four numbers above 0, not {depths}.")
        if tokens < 1:
            raise ValueError(f"tokens={tokens} of a VT-ResNet must be at least 1.")
        for name, number, divisor in (
            ("map_width", map_width, heads * map_groups // math.gcd(heads, map_groups)),
            ("token_width", token_width, 2 * heads * token_groups // math.gcd(heads, token_groups)),
        ):
            if number % divisor:
                raise ValueError(
                    f"{name}={number} of a VT-ResNet must be a multiple of {divisor}, for its "
                    "heads and groups."
                )
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        feature_info: dict[str, FeatureLevel] = {}
        width = 64
        for number, (depth, level) in enumerate(zip(depths[:3], LEVELS, strict=False), start=1):
            planes, stride = 64 * 2 ** (number - 1), 1 if number == 1 else 2
            self.add_module(
                f"layer{number}", stage(block, width, planes, depth, stride, norm=_NORM)
            )
            width = planes * _EXPANSION[block]
            feature_info[level] = FeatureLevel(channels=width, stride=4 * 2 ** (number - 1))
        same = width == map_width
        self.widen = nn.Identity() if same else _Convolution(width, map_width)
        self.vt = nn.ModuleList(
            VTModule(
                map_width,
                tokens,
                token_width,
                heads,
                map_groups,
                token_groups,
                recurrent=index > 0,
                projects=last_projector or index < depths[3] - 1,
            )
            for index in range(depths[3])
        )
        self.width = token_width
        self.feature_info = {**feature_info, "c5": FeatureLevel(channels=map_width, stride=32)}
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Return the average of the last tokens: (b, channels, h, w) to (b, token_width)."""
        return self._tokens(self._maps(images)["c4"])[1].mean(2)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the stages: (b, channels, h, w) to c2, c3, c4, c5."""
        maps = self._maps(images)
        x, _ = self._tokens(maps["c4"])
        return {**maps, "c5": F.avg_pool2d(x, 2, ceil_mode=True)}

    def units(self) -> list[nn.Module]:
        """Return the residual blocks and the modules."""
        blocks = [b for n in (1, 2, 3) for b in self.get_submodule(f"layer{n}").children()]
        return [*blocks, *self.vt]

    def compile_units(self) -> list[nn.Module]:
        """Return the whole trunk."""
        return [self]

    def init_weights(self) -> None:
        """Initialise convolutions from N(0, 2 / (k * k * outputs)), BatchNorm with 1 and 0."""
        init_convolutions(self)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number, level in enumerate(LEVELS[:3], start=1):
            x = self.get_submodule(f"layer{number}")(x)
            maps[level] = x
        return maps

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, tokens = self.vt[0](self.widen(x))
        for module in list(self.vt)[1:]:
            x, tokens = module(x, tokens)
        return x, tokens
