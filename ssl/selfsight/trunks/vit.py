"""Vision transformers: tiny, small, base and large.

"An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021), with the initialisation and the position
interpolation of "Emerging Properties in Self-Supervised Vision Transformers" (DINO, Caron et al.
2021). Parameter names are those of timm and DINO, without a classifier. Differences from DINO:

- attention is `scaled_dot_product_attention`;
- positions are interpolated by two small matrix products instead of `F.interpolate`, whose bicubic
  gradient is not deterministic on GPUs; the weights are the same;
- an image whose sides are no multiples of the patch size is refused: its rim would be ignored.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk

_NORM_EPS = 1e-6
_FEATURE_STRIDES = (4, 8, 16, 32)
# DINO passes (n + 0.1) / grid as the scale of the interpolation. It was meant to guard the size of
# the output against rounding, but the sampled points depend on it too, so published DINO weights
# expect it.
_SCALE_OFFSET = 0.1


class _PatchEmbed(nn.Module):
    """Cut images into patches and embed each: (b, c, h, w) to (b, h / p * w / p, width)."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """Multi-head self-attention over (b, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        qkv = self.qkv(x).reshape(b, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, tokens, width))


class _Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Pre-norm transformer block; each branch is dropped per sample with chance `drop_path`."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = _Mlp(width, hidden)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@final
class VisionTransformer(Trunk):
    """A plain vision transformer with a class token and learned positions.

    Args:
        width: length of a token.
        depth: number of blocks.
        heads: attention heads; they divide the width.
        in_channels: channels of an image.
        image_size: image side, in pixels, whose patches have a learned position each; other sizes
            get interpolated positions.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden width of the MLP over width.
        drop_path: chance of dropping a branch in the last block; it grows linearly from 0 in the
            first. Kept branches are scaled by 1 / (1 - chance).

    Levels of `features()`: the normalised patch tokens after each quarter of the blocks, as maps,
    resampled to strides 4, 8, 16, 32 by bilinear interpolation. (Detection adapters for plain ViTs
    do the same with learned convolutions; a detector may add its own.)

    Raises:
        ValueError: an argument is out of range or does not divide what it must.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        in_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} of a ViT must divide its width={width}.")
        if image_size % patch_size:
            raise ValueError(
                f"patch_size={patch_size} of a ViT must divide its image_size={image_size}."
            )
        if depth < len(LEVELS):
            raise ValueError(f"depth={depth} of a ViT must be at least {len(LEVELS)}.")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path of a ViT must be in [0, 1), not {drop_path}.")
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.width = width
        self.feature_info = {
            level: FeatureLevel(channels=width, stride=stride)
            for level, stride in zip(LEVELS, _FEATURE_STRIDES, strict=True)
        }
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        self.patch_embed = _PatchEmbed(in_channels, patch_size, width)
        self.blocks = nn.ModuleList(
            _Block(width, heads, int(width * mlp_ratio), drop_path * i / (depth - 1))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Return the class token after the last norm: (b, channels, h, w) to (b, width).

        Raises:
            ValueError: h or w is no multiple of the patch size.
        """
        x = self._tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return patch maps after each quarter of the blocks, resampled to strides 4 to 32.

        Raises:
            ValueError: h or w is no multiple of the patch size.
        """
        b, _, h, w = images.shape
        rows, columns = h // self.patch_size, w // self.patch_size
        level_of = {
            len(self.blocks) * (i + 1) // len(LEVELS): level for i, level in enumerate(LEVELS)
        }
        maps: dict[str, Tensor] = {}
        x = self._tokens(images)
        for done, block in enumerate(self.blocks, start=1):
            x = block(x)
            if done in level_of:
                level = level_of[done]
                stride = self.feature_info[level].stride
                patches = self.norm(x)[:, 1:].transpose(1, 2).reshape(b, -1, rows, columns)
                size = (math.ceil(h / stride), math.ceil(w / stride))
                maps[level] = F.interpolate(patches, size, mode="bilinear", align_corners=False)
        return maps

    def units(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def compile_units(self) -> list[nn.Module]:
        """Return the blocks: all have one graph, compiled once."""
        return list(self.blocks)

    def init_weights(self) -> None:
        """Initialise as DINO does.

        Tokens, positions and linear weights from a normal distribution with deviation 0.02 cut at
        +-2, linear biases 0, LayerNorm 1 and 0, the patch embedding as a new `nn.Conv2d`.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def _tokens(self, images: Tensor) -> Tensor:
        """Embed images and add positions: (b, channels, h, w) to (b, 1 + patches, width)."""
        b, _, h, w = images.shape
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"Images of {h}x{w} pixels do not divide into patches of {self.patch_size}; choose "
                f"crop sizes that are multiples of {self.patch_size}."
            )
        x = torch.cat((self.cls_token.expand(b, -1, -1), self.patch_embed(images)), dim=1)
        return x + self._positions(h // self.patch_size, w // self.patch_size)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return (1, 1 + rows * columns, width) positions, interpolated where needed."""
        if rows == columns == self.grid:
            return self.pos_embed
        # Bicubic interpolation is separable: one matrix for rows, one for columns. Not in half
        # precision, under autocast either.
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            table = self.pos_embed[0, 1:].float().reshape(self.grid, self.grid, -1)
            along_rows, along_columns = self._resampling(rows), self._resampling(columns)
            patches = torch.einsum("ri,ijd->rjd", along_rows, table)
            patches = torch.einsum("cj,rjd->rcd", along_columns, patches)
        patches = patches.reshape(1, rows * columns, -1).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)

    @torch.no_grad()
    def _resampling(self, size: int) -> Tensor:
        """Return the (size, grid) weights of bicubic interpolation from grid to size points."""
        basis = torch.eye(self.grid, device=self.pos_embed.device)[None, :, :, None]
        scale = ((size + _SCALE_OFFSET) / self.grid, 1.0)
        return F.interpolate(basis, scale_factor=scale, mode="bicubic")[0, :, :, 0].T
