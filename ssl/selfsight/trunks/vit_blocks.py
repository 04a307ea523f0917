"""The layers of a vision transformer, for token sequences of one length or of several at once.

One length: (b, tokens, width). Several: the sequences of all images one after the other in a packed
(total, width), with `shapes`, the (images, tokens) of each group of equal length; only attention
looks at them, everything else works on all tokens at once. Parameter names are DINOv2's, which are
timm's but for the gated MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from selfsight.trunks.geometry import gated_width

Shapes = Sequence[tuple[int, int]]
MLPS = ("gelu", "swiglu")


class PatchEmbed(nn.Module):
    """Cut images into patches and embed each: (b, c, h, w) to (b, h / p * w / p, width)."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over (b, tokens, width), or within the sequences of `shapes`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Shapes | None = None) -> Tensor:
        qkv = self.qkv(x)
        if shapes is None:
            return self.proj(self._attend(qkv))
        groups = qkv.split([images * tokens for images, tokens in shapes])
        attended = [
            self._attend(group.unflatten(0, shape)).flatten(0, 1)
            for group, shape in zip(groups, shapes, strict=True)
        ]
        return self.proj(torch.cat(attended))

    def weights(self, x: Tensor) -> Tensor:
        """Return what each token takes from each, in fp32: (b, heads, tokens, tokens)."""
        q, k, _ = self._heads(self.qkv(x))
        scale = q.shape[-1] ** -0.5
        return (q.float() @ k.float().transpose(-2, -1) * scale).softmax(-1)

    def _attend(self, qkv: Tensor) -> Tensor:
        """(b, tokens, 3 * width) to (b, tokens, width)."""
        b, tokens, width = qkv.shape
        x = F.scaled_dot_product_attention(*self._heads(qkv))
        return x.transpose(1, 2).reshape(b, tokens, width // 3)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, tokens, 3 * width) to queries, keys and values, (b, heads, tokens, d) each."""
        b, tokens, width = qkv.shape
        qkv = qkv.reshape(b, tokens, 3, self.heads, width // 3 // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    """SwiGLU ("GLU Variants Improve Transformer", Shazeer 2020): w3(silu(w1 x) * w2 x).

    It stands for an `Mlp` of `hidden` and is `gated_width(hidden)` wide. w1 and w2 are one layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = gated_width(hidden)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor a channel ("Going Deeper with Image Transformers", Touvron et al. 2021)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: length of a token.
        heads: attention heads.
        hidden: hidden width of the MLP.
        norm_eps: added to LayerNorm's variance.
        mlp: `gelu` or `swiglu`.
        layer_scale: first value of the factors after each branch, None for none.
        drop_path: chance that a branch is dropped for an image.
        subset: drop as DINOv2 does: a branch is computed only for a random subset of the images of
            each size, at least one, and what it gives is scaled by all / kept. Otherwise each image
            is drawn by itself, kept branches are scaled by 1 / (1 - chance), and all are computed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm_eps: float = 1e-6,
        mlp: str = "gelu",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        subset: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = GatedMlp(width, hidden) if mlp == "swiglu" else Mlp(width, hidden)
        scaled = layer_scale is not None
        self.ls1 = LayerScale(width, layer_scale) if scaled else nn.Identity()
        self.ls2 = LayerScale(width, layer_scale) if scaled else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.subset = subset

    def forward(self, x: Tensor, shapes: Shapes | None = None, attention: bool = False) -> Any:
        """Return the tokens after the block, of the shape of `x`.

        Args:
            x: (b, tokens, width); or packed (total, width) of several lengths.
            shapes: (images, tokens) of each length in a packed `x`.
            attention: return instead the attention weights (b, heads, tokens, tokens).
        """
        if attention:
            return self.attn.weights(self.norm1(x))
        x = self._add(x, shapes, lambda x, shapes: self.ls1(self.attn(self.norm1(x), shapes)))
        return self._add(x, shapes, lambda x, _: self.ls2(self.mlp(self.norm2(x))))

    def _add(
        self, x: Tensor, shapes: Shapes | None, branch: Callable[[Tensor, Shapes | None], Tensor]
    ) -> Tensor:
        """x + branch(x), dropped for some images while training."""
        if not self.training or self.drop_path.p == 0:
            return x + branch(x, shapes)
        if self.subset:
            return self._add_to_subset(x, shapes, branch)
        if shapes is None:
            return x + self.drop_path(branch(x, None))
        factors = [self.drop_path(x.new_ones(b, 1)).expand(b, n).flatten() for b, n in shapes]
        return x + branch(x, shapes) * torch.cat(factors)[:, None]

    def _add_to_subset(
        self, x: Tensor, shapes: Shapes | None, branch: Callable[[Tensor, Shapes | None], Tensor]
    ) -> Tensor:
        packed = shapes is not None
        rows: list[Tensor] = []  # of x: tokens if packed, else images
        factors: list[Tensor] = []
        kept_shapes: list[tuple[int, int]] = []
        start = 0
        for images, tokens in shapes if packed else [(x.shape[0], 1)]:
            kept = max(int(images * (1 - self.drop_path.p)), 1)
            chosen = torch.randperm(images, device=x.device)[:kept, None] * tokens
            chosen = chosen + torch.arange(tokens, device=x.device)
            rows.append(start + chosen.flatten())
            factors.append(x.new_full((kept * tokens,), images / kept))
            kept_shapes.append((kept, tokens))
            start += images * tokens
        index = torch.cat(rows)
        out = branch(x[index], kept_shapes if packed else None)
        factor = torch.cat(factors).view(-1, *[1] * (x.dim() - 1))
        return x.index_add(0, index, (out * factor).to(x.dtype))
