"""A tower's or a projector's parameters carried to views of another size, for good.

A tower that learnt at 378 pixels (27 x 27 patches of 14) then takes views of 672 (48 x 48), and
learns on from there, as in MM1.5: its table of positions is interpolated once, bicubically.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ConfigError
from .positions import bicubic


def carry(old: nn.Module, new: nn.Module, sides: tuple[int, int]) -> None:
    """Gives `new` the parameters of `old`, whose views had another number of patches: tables of
    positions interpolated, all else as it is.

    sides: tokens along a side of a table, of the old module and of the new.
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


def resize_table(table: mx.array, old: int, new: int) -> mx.array:
    """[extra + old * old, D] -> [extra + new * new, D] of the same dtype: rows of a square grid,
    and before them `extra` rows (a class token's), which stay as they are."""
    extra = len(table) - old * old
    rows = np.array(table.astype(mx.float32))
    square = rows[extra:].reshape(old, old, -1)
    along = bicubic(old, new).astype(np.float64)
    # Down the columns, then along the rows.
    square = np.einsum("yi,xj,ijd->yxd", along, along, square, optimize=True)
    whole = np.concatenate([rows[:extra], square.reshape(new * new, -1)])
    return mx.array(whole.astype(np.float32)).astype(table.dtype)
