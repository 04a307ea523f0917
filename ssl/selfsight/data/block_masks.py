"""Block-wise masks of patches (BEiT, Bao et al. 2021, arXiv:2106.08254, algorithm 1), as in iBOT
and DINOv2: rectangles are put onto the grid until a drawn share of it is covered.

A mask is a function of (seed, place of the sample in the stream, crop) alone: the same on any
number of ranks or micro-batches. DINOv2 draws the shares of a batch evenly spaced, which depends on
the batch; here each is drawn by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from selfsight.data.rng import hash64, uniforms

LEAST_AREA = 4  # patches of a block
ASPECT = 0.3  # of a block: from this to its inverse
ATTEMPTS = 128  # blocks tried for one mask


def block_masks(
    positions: Sequence[int] | np.ndarray,
    crops: int,
    grid: tuple[int, int],
    *,
    seed: int,
    share: float,
    ratio: tuple[float, float],
) -> np.ndarray:
    """Masks of `crops` crops of each sample.

    Args:
        positions: of the b samples in the stream.
        crops: crops of each sample that get a mask.
        grid: rows and columns of patches.
        seed: of the run.
        share: probability that a crop is masked at all.
        ratio: range of the share of its patches that is then masked, at most.

    Returns:
        bool (crops, b, rows * columns), true where the student sees the mask token.
    """
    rows, columns = grid
    names = [hash64("mask", seed, int(p), crop) for crop in range(crops) for p in positions]
    draws = uniforms(np.array(names, dtype=np.uint64), 2 + 4 * ATTEMPTS)
    masks = np.zeros((len(names), rows, columns), dtype=bool)
    for mask, u in zip(masks, draws, strict=True):
        if u[0] < share:
            wanted = int(rows * columns * (ratio[0] + (ratio[1] - ratio[0]) * u[1]))
            _cover(mask, wanted, u[2:].reshape(ATTEMPTS, 4).tolist())
    return masks.reshape(crops, len(positions), rows * columns)


def _cover(mask: np.ndarray, wanted: int, draws: list[list[float]]) -> None:
    """Put blocks onto `mask` (rows, columns) until `wanted` patches are covered, never more."""
    rows, columns = mask.shape
    covered = 0
    for area, aspect, top, left in draws:
        room = wanted - covered
        if room <= 0:
            return
        size = LEAST_AREA + (max(room, LEAST_AREA) - LEAST_AREA) * area
        ratio = math.exp((2 * aspect - 1) * -math.log(ASPECT))
        height, width = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if not (0 < height < rows and 0 < width < columns):
            continue
        y, x = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = mask[y : y + height, x : x + width]
        fresh = block.size - int(block.sum())
        if 0 < fresh <= room:
            block[:] = True
            covered += fresh
