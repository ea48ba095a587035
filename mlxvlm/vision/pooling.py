"""Fewer tokens from a square grid of them, over views [N, g*g, D] in rows.

An odd grid is padded at the right and bottom: 27 with a window of 2 gives 14, so 729 -> 196.
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


def _cells(x: mx.array, grid: int, window: int) -> mx.array:
    """[N, g*g, D] -> [N, side, side, window*window, D], zeros beyond the grid"""
    N, _, D = x.shape
    side = -(-grid // window)
    pad = side * window - grid
    x = mx.pad(x.reshape(N, grid, grid, D), [(0, 0), (0, pad), (0, pad), (0, 0)])
    x = x.reshape(N, side, window, side, window, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(N, side, side, window * window, D)
