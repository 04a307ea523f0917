"""Vision transformers: tiny to giant, DINO's and DINOv2's.

"An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021), with the initialisation and the position
interpolation of "Emerging Properties in Self-Supervised Vision Transformers" (DINO, Caron et al.
2021), and by option what "DINOv2" (Oquab et al. 2023) and "Vision Transformers Need Registers"
(Darcet et al. 2024) add. Parameter names are those of DINO and DINOv2 (without options, timm's
too), without a classifier. Differences from DINO:

- attention is `scaled_dot_product_attention`;
- positions are interpolated by two small matrix products instead of `F.interpolate`, whose bicubic
  gradient is not deterministic on GPUs; the weights are the same;
- an image whose sides are no multiples of the patch size is refused: its rim would be ignored.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.trunks.trunk import LEVELS, FeatureLevel, Trunk
from selfsight.trunks.vit_blocks import MLPS, Block, LayerScale, PatchEmbed

_FEATURE_STRIDES = (4, 8, 16, 32)


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
        mlp: `gelu`, or `swiglu`: gated, with two thirds of the hidden width (DINOv2 giant).
        drop_path: chance of dropping a branch in the last block; it grows linearly from 0 in the
            first. Kept branches are scaled by 1 / (1 - chance).
        drop_path_uniform: every block has the chance `drop_path`, as in DINOv2.
        drop_path_subset: branches are computed only for the images that keep them, as in DINOv2.
        layer_scale: first value of the learned factors after each branch, null for none. DINOv2
            trains with 1e-5.
        register_tokens: learned tokens between the class token and the patches, without positions.
        mask_token: have a learned token that stands for masked patches.
        norm_eps: added to LayerNorm's variance. Hugging Face's ViTs have 1e-12.
        position_offset: DINO passes (n + 0.1) / grid as the scale of the interpolation of positions
            to n patches. It was meant to guard the size of the output against rounding, but the
            sampled points depend on it too, so published DINO and DINOv2 weights expect it; those
            with registers, and timm, 0.
        position_antialias: smooth positions that are interpolated to fewer patches, as timm and
            DINOv2 with registers do.

    Attributes:
        prefix_tokens: tokens before the patches: the class token and the registers.

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
        mlp: str = "gelu",
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        drop_path_subset: bool = False,
        layer_scale: float | None = None,
        register_tokens: int = 0,
        mask_token: bool = False,
        norm_eps: float = 1e-6,
        position_offset: float = 0.1,
        position_antialias: bool = False,
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
        if mlp not in MLPS:
            raise ValueError(f"mlp of a ViT must be one of {', '.join(MLPS)}, not {mlp}.")
        if register_tokens < 0:
            raise ValueError(f"register_tokens={register_tokens} of a ViT must be at least 0.")
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.width = width
        self.prefix_tokens = 1 + register_tokens
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.feature_info = {
            level: FeatureLevel(channels=width, stride=stride)
            for level, stride in zip(LEVELS, _FEATURE_STRIDES, strict=True)
        }
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        registers = nn.Parameter(torch.empty(1, register_tokens, width))
        self.register_tokens = registers if register_tokens else None
        self.mask_token = nn.Parameter(torch.empty(1, width)) if mask_token else None
        self.patch_embed = PatchEmbed(in_channels, patch_size, width)
        chances = [drop_path * (1 if drop_path_uniform else i / (depth - 1)) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                int(width * mlp_ratio),
                norm_eps=norm_eps,
                mlp=mlp,
                layer_scale=layer_scale,
                drop_path=chance,
                subset=drop_path_subset,
            )
            for chance in chances
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.init_weights()

    # ------------------------------------------------------------------------------- forward

    def forward(self, images: Tensor) -> Tensor:
        """Return the class token after the last norm: (b, channels, h, w) to (b, width).

        Raises:
            ValueError: h or w is no multiple of the patch size.
        """
        return self.norm(self._run(images)[:, 0])

    def forward_views(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return the class tokens of image batches of several sizes, in one pass.

        The tokens of all images go through everything but attention together.
        """
        return [self.norm(x[:, 0]) for x in self._run_views(views)]

    def tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return all tokens after the last norm: (b, prefix_tokens + patches, width).

        Args:
            images: (b, channels, h, w).
            masks: bool (b, patches): patches that the mask token stands for.

        Raises:
            ValueError: h or w is no multiple of the patch size; or the trunk has no mask token.
        """
        return self.norm(self._run(images, masks))

    def tokens_views(self, views: Sequence[Tensor], masks: Tensor | None = None) -> list[Tensor]:
        """Return the tokens of image batches of several sizes, in one pass; `masks` are the first
        batch's."""
        return [self.norm(x) for x in self._run_views(views, masks)]

    def intermediate(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the tokens after each of the last n blocks, after the last norm, in order.

        Each is (b, prefix_tokens + patches, width).

        Raises:
            ValueError: n is not from 1 to the number of blocks.
        """
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"a ViT of {len(self.blocks)} blocks has no last {n} blocks")
        outputs: list[Tensor] = []
        x = self._embed(images)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def attention(self, images: Tensor, block: int = -1) -> Tensor:
        """Return what each token takes from each in one block, per head, in fp32.

        Computed again from the block's queries and keys: all else runs with fused kernels.

        Args:
            images: (b, channels, h, w).
            block: index of the block, counted from the end if negative.

        Returns:
            (b, heads, prefix_tokens + patches, the same); each row adds up to 1.
        """
        count = len(self.blocks)
        if not -count <= block < count:
            raise ValueError(f"a ViT of {count} blocks has no block {block}")
        x = self._embed(images)
        for before in list(self.blocks)[: block % count]:
            x = before(x)
        return self.blocks[block](x, attention=True)

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
        x = self._embed(images)
        for done, block in enumerate(self.blocks, start=1):
            x = block(x)
            if done in level_of:
                level = level_of[done]
                stride = self.feature_info[level].stride
                patches = self.norm(x)[:, self.prefix_tokens :]
                patches = patches.transpose(1, 2).reshape(b, -1, rows, columns)
                size = (math.ceil(h / stride), math.ceil(w / stride))
                maps[level] = F.interpolate(patches, size, mode="bilinear", align_corners=False)
        return maps

    # -------------------------------------------------------------------------- the contract

    def units(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def compile_units(self) -> list[nn.Module]:
        """Return the blocks: all have one graph, compiled once."""
        return list(self.blocks)

    def init_weights(self) -> None:
        """Initialise as DINO and DINOv2 do.

        Tokens, positions and linear weights from a normal distribution with deviation 0.02 cut at
        +-2, linear biases 0, LayerNorm 1 and 0, the patch embedding as a new `nn.Conv2d`; registers
        with deviation 1e-6, the mask token 0.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | LayerScale):
                module.reset_parameters()
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)

    # -------------------------------------------------------------------------------- tokens

    def _run(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens after the last block: (b, prefix_tokens + patches, width)."""
        x = self._embed(images, masks)
        for block in self.blocks:
            x = block(x)
        return x

    def _run_views(self, views: Sequence[Tensor], masks: Tensor | None = None) -> list[Tensor]:
        """The same for batches of several sizes, packed to one sequence."""
        if len(views) == 1:
            return [self._run(views[0], masks)]
        embedded = [self._embed(view, None if i else masks) for i, view in enumerate(views)]
        shapes = tuple((x.shape[0], x.shape[1]) for x in embedded)
        x = torch.cat([part.flatten(0, 1) for part in embedded])
        for block in self.blocks:
            x = block(x, shapes)
        parts = x.split([images * tokens for images, tokens in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embed images and add positions: (b, channels, h, w) to (b, prefix + patches, width)."""
        b, _, h, w = images.shape
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"Images of {h}x{w} pixels do not divide into patches of {self.patch_size}; choose "
                f"crop sizes that are multiples of {self.patch_size}."
            )
        patches = self.patch_embed(images)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masked patches need a mask token: set model.trunk.mask_token")
            token = self.mask_token.to(patches.dtype)
            patches = torch.where(masks[..., None], token, patches)
        x = torch.cat((self.cls_token.expand(b, -1, -1), patches), dim=1)
        x = x + self._positions(h // self.patch_size, w // self.patch_size)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(b, -1, -1)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)

    # ----------------------------------------------------------------------------- positions

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
        antialias = self.position_antialias
        if self.position_offset:
            scale = ((size + self.position_offset) / self.grid, 1.0)
            out = F.interpolate(basis, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            out = F.interpolate(basis, (size, self.grid), mode="bicubic", antialias=antialias)
        return out[0, :, :, 0].T
