"""Rows that begin alike, computed once.

Several questions about one picture share everything up to the end of the picture, which is most of
each row. The shared part runs once per picture and its keys and values serve every row:

    picture A ─┬─ question 1        prefix:   [G, P]
               ├─ question 2        branches: [G * R, L], each attends to its prefix and itself
    picture B ─┬─ question 3
               └─ question 4

mlx-lm hands each layer a cache object. These two stand in its place, so any attention-only decoder
runs unchanged, gradients flow into the prefix, and positions are those of the unshared row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from .forward import blocks_of
from .packed import state_of


class PrefixCache:
    """Keeps the keys and values [G, heads, P, head_dim] of the shared part, and changes nothing."""

    offset = 0

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return _causal(N, 0, return_array, window_size)


class BranchCache:
    """Puts each row's prefix before its own keys and values; rows are grouped by prefix."""

    def __init__(self, prefix: PrefixCache, rows: int):
        self.prefix, self.rows = prefix, rows
        self.offset = prefix.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        def join(shared: mx.array, own: mx.array) -> mx.array:
            return mx.concatenate([mx.repeat(shared, self.rows, axis=0), own], axis=2)

        return join(self.prefix.keys, keys), join(self.prefix.values, values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return _causal(N, self.offset, return_array, window_size)


def prefix_caches(lm: nn.Module) -> list[PrefixCache]:
    """One cache a layer, or an error for decoders that keep a state other than keys and values."""
    if state := state_of(lm):
        raise ConfigError(
            f"rows cannot share a prefix under language models of type {lm.model_type!r}: {state}. "
            "Train without --share-prefix."
        )
    return [PrefixCache() for _ in blocks_of(lm)]


def _causal(N: int, offset: int, return_array: bool, window_size: int | None) -> Any:
    from mlx_lm.models.base import create_causal_mask

    if return_array or (window_size is not None and offset + N > window_size):
        return create_causal_mask(N, offset, window_size=window_size)
    return None if N == 1 else "causal"
