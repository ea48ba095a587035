"""A learned table of positions for another grid: as bicubic interpolation of the one it has.

A tower that learnt at 378 pixels (27 x 27 patches of 14) then takes views of 672 (48 x 48), as in
MM1.5. The rule is torch's `interpolate(mode="bicubic", align_corners=False)`: Keys' cubic with
a = -0.75, the edge's value beyond the edge, no smoothing where the grid shrinks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ConfigError

SHARPNESS = -0.75


@lru_cache
def bicubic(old: int, new: int) -> np.ndarray:
    """float64 [new, old]: what each of `new` places along a side takes from `old`; rows sum to 1.

    The middle of place i lies at (i + 1/2) old / new - 1/2 among the old ones, and the four nearest
    have a say."""
    matrix = np.zeros((new, old))
    where = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(where).astype(np.int64) - 1
    for tap in range(4):
        share = _cubic(np.abs(where - (first + tap)))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), share)
    return matrix


def resize_table(table: mx.array, old: int, new: int) -> mx.array:
    """[extra + old * old, D] -> [extra + new * new, D] of the same dtype: rows of a square grid,
    and before them `extra` rows (a class token's), which stay as they are."""
    extra = len(table) - old * old
    rows = np.array(table.astype(mx.float32)).astype(np.float64)
    along = bicubic(old, new)
    square = rows[extra:].reshape(old, old, -1)
    # Down the columns, then along the rows.
    square = np.einsum("yi,xj,ijd->yxd", along, along, square, optimize=True)
    whole = np.concatenate([rows[:extra], square.reshape(new * new, -1)])
    return mx.array(whole.astype(np.float32)).astype(table.dtype)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys 1981, of distances below 2."""
    a, d = SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def carry(old: nn.Module, new: nn.Module, sides: tuple[int, int]) -> None:
    """Gives `new` the parameters of `old`, whose views had another number of patches: tables of
    positions interpolated, all else as it is.

    sides: tokens along a side of a view, of the old module and of the new.
    """
    if any("scales" in module for module in old.modules()):
        raise ConfigError(
            "a quantised tower or projector cannot take views of another size: start from the "
            "model that it was made from, and quantise afterwards."
        )
    flat: Any = tree_flatten(old.parameters())
    wanted: dict[str, mx.array] = dict(tree_flatten(new.parameters()))
    ready = []
    for name, value in flat:
        if value.shape != wanted[name].shape:  # InternViT's table has an axis of 1 before it
            table = value.reshape(-1, value.shape[-1])
            value = resize_table(table, *sides).reshape(wanted[name].shape)
        ready.append((name, value))
    new.load_weights(ready)
