"""Several rows in one line of tokens, none of which sees another.

    tokens     a a a a b b b c c c c . .        the mask of a full layer      of a window of 2
    segments   0 0 0 0 1 1 1 2 2 2 2 3 3        a   x                         x
                                                a   x x                       x x
mlx-lm hands each layer a cache object and        a x x x                       x x
asks it for the layer's mask. The one here        b       x                         x
keeps nothing and answers with the mask of        b       x x                       x x
the pack, so every layer gets its own window.

Positions run on through a line instead of starting again: a rotary embedding sees distances only,
and within a row these are the same. A decoder for which that does not hold is found by trying it
out, and refused.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..dtypes import dtype_of
from ..errors import ConfigError
from .forward import decoder, embedding, hidden_states

# The longest line: under an array mask attention keeps L x L scores a head and a layer.
PACK_LIMIT = 2048

# Two runs of one row may differ by so much of their size: rounding, in float32 and in less.
EXACT, ROUNDED = 1e-3, 0.15


class PackedCache:
    """Stands in for the cache of every layer of one packed batch; segments: int [B, L]."""

    def __init__(self, segments: np.ndarray, offset: int = 0):
        self.segments, self.offset = segments, offset
        self._masks: dict[int | None, mx.array] = {}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """bool [B, 1, L, L]: causal, within a segment and the layer's window."""
        if window_size is not None and window_size >= N:
            window_size = None
        if window_size not in self._masks:
            from mlx_lm.models.base import create_causal_mask

            segments = mx.array(self.segments)
            same = segments[:, :, None] == segments[:, None, :]
            mask = same & create_causal_mask(N, window_size=window_size)
            self._masks[window_size] = mask[:, None]
        return self._masks[window_size]


def packed_caches(lm: nn.Module, segments: np.ndarray) -> list[PackedCache]:
    """What a trunk takes as its cache, for lines whose rows `segments` [B, L] tells apart."""
    from mlx_lm.models.cache import make_prompt_cache

    return [PackedCache(segments)] * len(make_prompt_cache(lm))


def state_of(lm: nn.Module) -> str | None:
    """What a layer keeps other than keys and values, in words; None where attention is all."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    for index, cache in enumerate(make_prompt_cache(lm)):
        if not isinstance(cache, (KVCache, RotatingKVCache)):
            return f"layer {index} keeps {'an' if type(cache).__name__[0] in 'AEIOU' else 'a'} " + (
                type(cache).__name__
            )
    return None


def longest_pack(lm: nn.Module) -> int:
    """How many tokens a line may hold, once the decoder has shown that it can be packed."""
    positions = getattr(getattr(decoder(lm), "args", None), "max_position_embeddings", None)
    # Past a decoder's own positions some change their rotation for the whole line.
    longest = min(PACK_LIMIT, positions) if isinstance(positions, int) else PACK_LIMIT
    check_packs(lm, longest)
    return longest


def check_packs(lm: nn.Module, longest: int) -> None:
    """Refuses a decoder whose rows would feel each other, or their place in the line.

    By the state that its layers keep, which recurrent and convolutional ones carry on from row to
    row, and by trying it out: two rows in a line, as far from its start as they may come to lie.
    """
    if state := state_of(lm):
        raise ConfigError(
            f"rows cannot be packed under language models of type {lm.model_type!r}: {state}, "
            "which one row would hand on to the next. Train with --batching buckets."
        )
    first, second = 12, 20
    far = max(0, longest - first - second)
    ids = mx.arange(1, first + second + 1)[None] % 64
    line = embedding(lm)(ids)
    segments = np.array([[0] * first + [1] * second])
    caches = [PackedCache(segments, far)] * len(packed_caches(lm, segments))
    together = hidden_states(lm, line, caches)[0].astype(mx.float32)
    most = EXACT if dtype_of(lm) == mx.float32 else ROUNDED
    for cut in (slice(0, first), slice(first, None)):
        alone = hidden_states(lm, line[:, cut])[0].astype(mx.float32)
        off = mx.sqrt(mx.square(together[:, cut] - alone).mean() / mx.square(alone).mean())
        if not off.item() <= most:  # type: ignore[operator]
            raise ConfigError(
                f"rows cannot be packed under language models of type {lm.model_type!r}: in a "
                f"line with others a row's hidden states differ by {off.item():.1g} of their size. "
                "Train with --batching buckets."
            )
