"""LLaVA-UHD's resampler: each learned query looks at its own part of the view, once.

    12 x 12 queries over any grid of patches      +---+---+---+   query i, j sees what lies in
    (two and a half patches a window here)        |qq |   |   |   window i, j, sampled at 3 x 3
                                                  +---+---+---+   points, or 4 x 2, 2 x 3, ... by
                                                  |   |   |   |   the view's shape

Xu et al. 2024, https://arxiv.org/abs/2403.11703, with `AdaptSpatialResampler` of its authors' code
for what the paper leaves open. Parameters have the published names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..config import ProjectorConfig
from ..errors import ConfigError
from ..vision.positions import place
from .resampler import Queries, sincos

# Points that a window is sampled at, (across, down); the first of equals.
WINDOWS = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))


class SpatialResampler(Queries):
    """[N, T, Dv] -> [N, num_query_tokens, Dl]; views of one grid.

    Keys carry `pos_embed` resized to the view's grid, and ln_q's queries carry it as it is.
    """

    def __init__(self, config: ProjectorConfig, vision_width: int, language_width: int, grid: int):
        super().__init__(config, vision_width, language_width)
        self.grid = grid
        self.side = math.isqrt(config.num_query_tokens)
        self.pos_embed = mx.array(sincos(self.side, self.side, self.query.shape[1]))

    def __call__(self, x: mx.array, sizes: Sequence[tuple[int, int]] | None = None) -> mx.array:
        """sizes: (rows, columns) of each view's patches; by default the encoder's square grid."""
        grid = (self.grid, self.grid) if sizes is None else sizes[0]
        N, T, _ = x.shape
        if T != grid[0] * grid[1] or len(set(sizes or [grid])) > 1:
            raise ConfigError(
                f"the projector takes views of one grid, {grid[0]} x {grid[1]} tokens, but the "
                f"features have {T} a view."
            )
        x = self.seen(x)
        places = place(self.pos_embed, "bicubic", grid)[None]
        values = self._windows(x, grid)
        # A window of a sum is the sum of the windows.
        around = self._windows(places, grid).astype(values.dtype)
        keys = values + mx.tile(around, (N, 1, 1))
        queries = self.ln_q(self.query) + self.pos_embed
        Q, D = queries.shape
        each = mx.broadcast_to(queries[None], (N, Q, D)).reshape(N * Q, 1, D)
        out = self.attn(each, keys, values).reshape(N, Q, D)
        return self.ln_post(out) @ self.proj

    def _windows(self, x: mx.array, grid: tuple[int, int]) -> mx.array:
        """[N, h * w, D] -> [N * windows, points, D]"""
        (h, w), side, N, D = grid, self.side, x.shape[0], x.shape[-1]
        across, down = _points(grid)
        rows, columns = (mx.array(_samples(n, side, k)) for n, k in ((h, down), (w, across)))
        y = rows @ x.astype(mx.float32).reshape(N, h, w * D)
        y = columns @ y.reshape(N * side * down, w, D)
        y = y.reshape(N, side, down, side, across, D).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(N * side * side, down * across, D).astype(x.dtype)


def _points(grid: tuple[int, int]) -> tuple[int, int]:
    """The (across, down) of WINDOWS that is most like a view of (rows, columns) patches."""
    shape = math.log(grid[1] / grid[0])
    return min(WINDOWS, key=lambda window: abs(shape - math.log(window[0] / window[1])))


@lru_cache(256)
def _samples(length: int, windows: int, points: int) -> np.ndarray:
    """float32 [windows * points, length]: what each point of each window is, of `length` patches
    along an axis, as torchvision's RoIAlign has it (He et al. 2017; aligned=False).

    A point is the mean of ceil(window / points) places, each between its two neighbours; a window
    is at least one patch long, and what lies beyond the view is nothing.
    """
    matrix = np.zeros((windows * points, length))
    size = max(length / windows, 1.0)
    count = math.ceil(size / points)
    for row in range(windows * points):
        window, point = divmod(row, points)
        for i in range(count):
            at = window * length / windows + (point + (i + 0.5) / count) * size / points
            if at > length:
                continue
            low = min(int(at), length - 1)
            share = at - low if low < length - 1 else 0.0
            matrix[row, low] += (1 - share) / count
            matrix[row, min(low + 1, length - 1)] += share / count
    return matrix.astype(np.float32)
