"""The vectors of an image that evaluations and classifiers take from a trunk, by name.

feature            what the trunk's forward gives
c2 ... c5          a level of the trunk, averaged over the image
c4_3x3             the same averaged over a grid of so many cells, flattened (VISSL probes res4 so)
block1 ... block4  of ViTs: the class token after the last block, the one before it, ...
patches            of ViTs: the mean of the last block's patch tokens
gem                generalised mean (power 3) of the last level, or of the last patch tokens
"""

import re
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from selfsight.trunks.trunk import LEVELS, Trunk

BLOCKS = 4
GEM_POWER = 3.0


def names(trunk: Trunk) -> list[str]:
    """The vectors that this trunk can give, but for those on grids."""
    tokens = [f"block{i}" for i in range(1, BLOCKS + 1)] + ["patches"]
    return ["feature", *LEVELS, "gem", *(tokens if is_vit(trunk) else [])]


def is_vit(trunk: Trunk) -> bool:
    """Whether the trunk has tokens of single blocks."""
    return callable(getattr(trunk, "intermediate", None))


def check(trunk: Trunk, wanted: Iterable[str]) -> None:
    """Raise ValueError for a name that this trunk does not have."""
    known = names(trunk)
    for name in wanted:
        base = re.sub(r"_\d+x\d+$", "", name)
        if base not in known or (base != name and base not in LEVELS):
            raise ValueError(
                f"this trunk has no vector {name!r}: it has {', '.join(known)}, and levels on a "
                "grid such as c5_2x2"
            )


def width_of(trunk: Trunk, name: str) -> int:
    """Length of a named vector."""
    level, _, grid = name.partition("_")
    if level in LEVELS:
        rows, columns = map(int, grid.split("x")) if grid else (1, 1)
        return trunk.feature_info[level].channels * rows * columns
    if name == "gem" and not is_vit(trunk):
        return trunk.feature_info[LEVELS[-1]].channels
    return trunk.width


def vectors(trunk: Trunk, images: Tensor, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The named vectors of normalised images (b, C, h, w): fp32 (b, d) each."""
    wanted = list(wanted)
    found: dict[str, Tensor] = {}
    if "feature" in wanted:
        found["feature"] = trunk(images)
    token_names = [n for n in wanted if n.startswith("block") or n == "patches"]
    if token_names or ("gem" in wanted and is_vit(trunk)):
        vit: Any = trunk
        blocks = list(vit.intermediate(images, BLOCKS))
        prefix = getattr(vit, "prefix_tokens", 1)
        for name in token_names:
            if name == "patches":
                found[name] = blocks[-1][:, prefix:].mean(1)
            else:
                found[name] = blocks[-int(name[5:])][:, 0]
        if "gem" in wanted:
            found["gem"] = gem(blocks[-1][:, prefix:].transpose(1, 2))
    rest = [n for n in wanted if n not in found]
    if rest:
        maps = trunk.features(images)
        for name in rest:
            level, _, grid = name.partition("_")
            if name == "gem":
                found[name] = gem(maps[LEVELS[-1]].flatten(2))
            elif grid:
                rows, columns = map(int, grid.split("x"))
                found[name] = F.adaptive_avg_pool2d(maps[level], (rows, columns)).flatten(1)
            else:
                found[name] = maps[level].mean((2, 3))
    return {name: found[name].float() for name in wanted}


def gem(positions: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over positions, (b, d, n) -> (b, d): the p-th root of the mean p-th power
    (Radenovic et al. 2018, arXiv:1711.02512, equation 3), of what is above 0."""
    return positions.float().clamp(min=1e-6).pow(power).mean(-1).pow(1 / power)
