"""Fewer tokens from a square grid of them, over views [N, g*g, D] in rows.

For `mean2` and `concat` an odd grid is padded at the right and bottom: 27 with a window of 2 gives
14, so 729 -> 196.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def mean2(x: mx.array, grid: int) -> mx.array:
    """[N, g*g, D] -> [N, ceil(g/2)^2, D]: the mean of each 2x2 cell, over what is there of it."""
    side = -(-grid // 2)
    # Half precision would round a sum of four before the division.
    sums = _cells(x.astype(mx.float32), grid, 2).sum(axis=3)
    there = np.full(side, 2.0, dtype=np.float32)
    there[-1] = grid - 2 * (side - 1)
    counts = mx.array(np.outer(there, there)[None, :, :, None])
    return (sums / counts).reshape(x.shape[0], side * side, -1).astype(x.dtype)


def concat(x: mx.array, grid: int, window: int) -> mx.array:
    """[N, g*g, D] -> [N, ceil(g/w)^2, w*w*D]: the tokens of a w x w cell, in rows, as one."""
    side = -(-grid // window)
    return _cells(x, grid, window).reshape(x.shape[0], side * side, -1)


def adaptive_mean(x: mx.array, side: int) -> mx.array:
    """[N, H, W, D] -> [N, side, side, D]: means of bins that cover the grid evenly.

    Bin i goes from floor(i n / side) to ceil((i + 1) n / side), as torch's adaptive_avg_pool2d has
    it, so bins overlap where n does not divide: 27 to 12 has bins of 3 and 4.
    """
    out = x.astype(mx.float32)
    for axis in (1, 2):
        n = out.shape[axis]
        bins = [range(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
        means = [
            (out[:, b.start : b.stop] if axis == 1 else out[:, :, b.start : b.stop]).mean(axis)
            for b in bins
        ]
        out = mx.stack(means, axis)
    return out.astype(x.dtype)


def _cells(x: mx.array, grid: int, window: int) -> mx.array:
    """[N, g*g, D] -> [N, side, side, window*window, D], zeros beyond the grid"""
    N, _, D = x.shape
    side = -(-grid // window)
    pad = side * window - grid
    x = mx.pad(x.reshape(N, grid, grid, D), [(0, 0), (0, pad), (0, pad), (0, 0)])
    x = x.reshape(N, side, window, side, window, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(N, side, side, window * window, D)
