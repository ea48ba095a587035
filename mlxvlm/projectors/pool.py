"""The pooling step in front of every projector."""

from __future__ import annotations

import mlx.core as mx

from ..config import POOLS
from ..errors import ConfigError
from ..vision.pooling import concat, mean2


class Pool:
    """[N, T, D] -> [N, T', D * factor], as `projector.pool` says, for a square grid of tokens.

    With "mean2" an input of already pooled tokens is taken as it is: a cache may hold those.
    """

    def __init__(self, pool: str, grid: int):
        self.kind = pool
        self.grid = grid
        self.window = POOLS[pool]
        self.factor = self.window**2 if pool.startswith("concat") else 1
        self.side = -(-grid // self.window)
        self.tokens = self.side**2

    def __call__(self, x: mx.array) -> mx.array:
        T = x.shape[1]
        if self.kind == "none" or (self.kind == "mean2" and T == self.tokens):
            return x
        if T != self.grid**2:
            also = f" or {self.tokens} already pooled ones" if self.kind == "mean2" else ""
            raise ConfigError(
                f"projector.pool {self.kind!r} takes {self.grid**2} tokens a view "
                f"({self.grid} x {self.grid}){also}, but the features have {T}."
            )
        if self.kind == "mean2":
            return mean2(x, self.grid)
        x = concat(x, self.grid, self.window)
        if self.kind == "concat2_columns":
            N, T, D = x.shape
            x = x.reshape(N, self.side, self.side, D).swapaxes(1, 2).reshape(N, T, D)
        return x
