"""The state that a decoder keeps between tokens, a cache a layer, through mlx-lm: made, copied, cut
back, weighed.

What can be done with a state depends on its kinds of cache:

    keys and values of everything     cut back to any length; quantised: the same
    a decoder's own sliding window    cut back as far as its buffer still holds a whole window
    --max-kv-size                     as long as nothing was overwritten; from then on it hangs on
                                      how the tokens were cut into calls, and is never used again
    recurrent, convolutional          as it stands, whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import ConfigError

# What --max-kv-size never overwrites: the first tokens, which every other attends to (mlx-lm's 4).
SINK = 4
# Others do not fill words evenly, which mlx-lm's cache counts on.
BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class KVSettings:
    """How keys and values are kept.

    max_size: of each layer at most so many positions, the first `SINK` and the latest; None: all.
    bits: they are quantised (affine, groups of `group_size`) from the first token on, so that what
        a position sees hangs on the tokens before it and not on how these were cut into calls.
    """

    max_size: int | None = None
    bits: int | None = None
    group_size: int = 64

    def check(self) -> None:
        rules = (
            ("max_kv_size", self.max_size, self.max_size is None or self.max_size > SINK)
            + (f"above {SINK}, the first tokens, which are always kept",),
            ("kv_bits", self.bits, self.bits is None or self.bits in BITS, f"one of {BITS}"),
            ("kv_group_size", self.group_size, self.group_size in GROUP_SIZES)
            + (f"one of {GROUP_SIZES}",),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name} (={value}) must be {rule}.")
        if self.max_size is not None and self.bits is not None:
            raise ConfigError(
                "kv_bits and max_kv_size cannot go together: mlx-lm does not quantise a cache that "
                "overwrites itself. Choose one of them."
            )


def make_caches(lm: nn.Module, kv: KVSettings) -> list[Any]:
    """An empty state; `kv` rules the layers that keep everything, the others stay as they are."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(lm)
    if kv.bits is None and kv.max_size is None:
        return caches
    plain = [i for i, cache in enumerate(caches) if type(cache) is KVCache]
    if not plain:
        setting = "kv_bits" if kv.bits is not None else "max_kv_size"
        raise ConfigError(
            f"{setting} has nothing to act on: no layer of this language model keeps the keys and "
            "values of all tokens."
        )
    if kv.bits is not None:
        _check_group(lm, plain, kv.group_size)
    for i in plain:
        caches[i] = (
            QuantizedKVCache(group_size=kv.group_size, bits=kv.bits)
            if kv.bits is not None
            else RotatingKVCache(max_size=kv.max_size, keep=SINK)
        )
    return caches


def _check_group(lm: Any, layers: list[int], group_size: int) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    probe = make_prompt_cache(lm)
    lm(mx.zeros((1, 1), dtype=mx.int32), cache=probe)  # shapes alone: nothing is evaluated
    widths = {x.shape[-1] for i in layers for x in (probe[i].keys, probe[i].values)}
    if bad := sorted(width for width in widths if width % group_size):
        raise ConfigError(
            f"kv_group_size (={group_size}) must divide the width of this language model's heads, "
            f"which is {bad[0]}: use a smaller group ({GROUP_SIZES[0]} is the smallest) or do "
            "without kv_bits."
        )


def is_free(caches: list[Any]) -> bool:
    """Whether every layer can be cut back to any length."""
    return all(type(cache).__name__ in ("KVCache", "QuantizedKVCache") for cache in caches)


def copied(caches: list[Any]) -> list[Any]:
    """The same state in arrays of its own; memory is copied when one of the two is written to."""
    return [_copy(cache) for cache in caches]


def cut(caches: list[Any], length: int, keep: int) -> list[Any] | None:
    """A copy of a state after `length` tokens as it was after the first `keep`; None if it cannot
    be had. `caches` themselves are left as they are."""
    out = [_cut(cache, length, keep) for cache in caches]
    return None if any(cache is None for cache in out) else out


def arrays_of(caches: list[Any]) -> list[mx.array]:
    """Every array that a state holds."""
    flat = tree_flatten([cache.state for cache in caches])
    return [item for _, item in flat if isinstance(item, mx.array)]


def nbytes(caches: list[Any]) -> int:
    """Bytes that a state takes, room for tokens to come included."""
    return sum(array.nbytes for array in arrays_of(caches))


@dataclass
class State:
    """A state's layers as JSON values, and its arrays by name, to be kept in a file.

    Of layers that keep everything, the arrays are of the tokens [start, end) alone.
    """

    layers: list[dict[str, Any]]
    arrays: dict[str, mx.array]


def pack(caches: list[Any], start: int, end: int) -> State:
    """The state after `end` tokens, as it follows the one after `start`."""
    layers: list[dict[str, Any]] = []
    arrays: dict[str, mx.array] = {}
    for number, cache in enumerate(caches):
        kind = type(cache).__name__
        free = is_free([cache])
        kept: Any = cache.state
        if free:
            sliced = tree_map(lambda x: x[..., start:end, :], (cache.keys, cache.values))
            kept = [*sliced, *cache.state[2:]]
        values = []
        for name, item in tree_flatten(kept):
            if isinstance(item, mx.array):
                arrays[f"{number}.{name}"] = mx.contiguous(item)
            else:
                values.append([name, item])
        layers.append({"cache": kind, "free": free, "values": values})
    return State(layers, arrays)


def unpack(states: list[State], end: int) -> list[Any]:
    """The caches after the last of consecutive states, `end` tokens in all."""
    from mlx_lm.models import cache as kinds

    out = []
    for number, layer in enumerate(states[-1].layers):
        mark = f"{number}."
        parts = [
            {n.removeprefix(mark): x for n, x in state.arrays.items() if n.startswith(mark)}
            for state in (states if layer["free"] else states[-1:])
        ]
        joined = (
            {name: mx.concatenate([p[name] for p in parts], axis=2) for name in parts[-1]}
            if (len(parts) > 1)
            else parts[0]
        )
        # Names in the order in which they were flattened, numbers by their value.
        items = sorted(
            [*joined.items(), *layer["values"]],
            key=lambda item: [int(part) for part in item[0].split(".")],
        )
        cache = getattr(kinds, layer["cache"]).from_state(tree_unflatten(items))
        if layer["free"]:
            cache.offset = end
        out.append(cache)
    return out


def _copy(cache: Any) -> Any:
    # mlx-lm writes into its arrays in place, which every holder of the same object would see.
    state = tree_map(lambda x: x[...] if isinstance(x, mx.array) else x, cache.state)
    return type(cache).from_state(state)


def _cut(cache: Any, length: int, keep: int) -> Any | None:
    kind = type(cache).__name__
    if kind in ("KVCache", "QuantizedKVCache"):
        out = _copy(cache)
        out.keys, out.values = tree_map(lambda x: x[..., :keep, :], (out.keys, out.values))
        out.offset = keep
        return out
    if kind == "RotatingKVCache":
        return _cut_rotating(cache, length, keep)
    if kind == "CacheList":
        parts = [_cut(part, length, keep) for part in cache.caches]
        return None if any(part is None for part in parts) else type(cache)(*parts)
    return _copy(cache) if keep == length else None


def _cut_rotating(cache: Any, length: int, keep: int) -> Any | None:
    window = cache.max_size
    if cache.keep and length >= window:
        return None
    if keep == length:
        return _copy(cache)
    out = _copy(cache)
    keys, values = (cache._temporal_order(x) for x in (cache.keys, cache.values))
    first = length - keys.shape[2]  # the position of the oldest entry
    start = max(0, keep - window)
    if first > start:
        return None
    out.keys, out.values = (x[..., start - first : keep - first, :] for x in (keys, values))
    out.offset, out._idx = keep, keep - start
    return out
