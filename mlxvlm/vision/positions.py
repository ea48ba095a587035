"""Learned positions for views of any grid, from one square table.

    fixed     the table as it is: a view has its grid                         SigLIP, CLIP
    buckets   the patch at row i of h has the table's row floor(side i / h),  NaViT, Idefics2,
              and so with columns: the entry at its share of the view         MiniCPM-V
    bicubic   the table, resized to the view's grid                           LLaVA-UHD

Dehghani et al. 2023, https://arxiv.org/abs/2307.06304, for the first of the two; the shares are
taken as exact fractions, which is where float32 leaves them but for ties.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

# PyTorch's bicubic kernel.
SHARPNESS = -0.75


def place(table: mx.array, rule: str, grid: tuple[int, int]) -> mx.array:
    """[side * side, D] -> [h * w, D], the positions of a view of (h, w) patches, in rows."""
    side = math.isqrt(len(table))
    if rule == "fixed" or grid == (side, side):
        return table
    if rule == "buckets":
        return table[mx.array(buckets(side, grid))]
    x = table.astype(mx.float32).reshape(side, side, -1)
    down, across = (mx.array(bicubic(side, n)) for n in grid)
    x = mx.tensordot(down, x, axes=1)  # [h, side, D]
    x = across @ x  # [h, w, D]
    return x.reshape(grid[0] * grid[1], -1).astype(table.dtype)


@lru_cache(256)
def buckets(side: int, grid: tuple[int, int]) -> np.ndarray:
    """int32 [h * w]: which entry of a side * side table each patch has."""
    rows, columns = (np.arange(n) * side // n for n in grid)
    return (rows[:, None] * side + columns).reshape(-1).astype(np.int32)


@lru_cache(256)
def bicubic(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: bicubic interpolation of `old` samples at `new` places along an axis, as
    torch's `interpolate` has it (align_corners=False, no antialiasing, edges repeated)."""
    matrix = np.zeros((new, old))
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    for tap in range(4):
        far = np.abs(centre - (first + tap))
        a = SHARPNESS
        near = ((a + 2) * far - (a + 3)) * far * far + 1
        tail = ((far - 5) * far + 8) * far * a - 4 * a
        at = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), at), np.where(far <= 1, near, tail))
    return matrix.astype(np.float32)
