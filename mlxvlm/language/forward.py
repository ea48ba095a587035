"""A language model in pieces: trunk, hidden states, head.

mlx-lm's models map tokens to the logits of every position. Training wants less (logits where
something is supervised) and more (hidden states of a middle layer), from any decoder, without a
copy of its code. So the trunk and the head are called apart, and layers are wrapped for one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError

# What mlx-lm's blocks call the part that takes each position by itself.
POINTWISE = ("mlp", "feed_forward", "block_sparse_moe")


def decoder(lm: nn.Module) -> Any:
    """The text decoder itself, which some of mlx-lm's classes (gemma3, mistral3) hold inside."""
    return lm.language_model if "language_model" in lm else lm


def trunk(lm: nn.Module) -> nn.Module:
    """The decoder below its head: embeddings in, normed hidden states out."""
    inner = getattr(decoder(lm), "model", None)
    if inner is None or not hasattr(inner, "layers"):
        raise ConfigError(
            f"language models of type {lm.model_type!r} cannot be used here: mlx-lm's class has "
            "no `model` with `layers` under its head."
        )
    return inner


def blocks_of(lm: nn.Module) -> list[Any]:
    """The decoder's blocks: the list itself, not a copy."""
    blocks: Any = trunk(lm).layers
    return blocks


def embedding(lm: nn.Module) -> Any:
    """The token embedding table of a decoder."""
    inner = trunk(lm)
    for name in ("embed_tokens", "tok_embeddings", "wte", "word_embeddings"):
        if hasattr(inner, name):
            return getattr(inner, name)
    raise ConfigError(f"no token embedding found in language models of type {lm.model_type!r}.")


def head(lm: nn.Module, hidden: mx.array) -> mx.array:
    """Logits [..., V] of normed hidden states [..., D]."""
    module = head_module(lm)
    return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)


def head_module(lm: nn.Module) -> Any:
    """The module whose weights make the logits: the head, or the table where they are tied."""
    inner = decoder(lm)
    for name in ("lm_head", "output"):
        if name in inner:
            return inner[name]
    return embedding(lm)


def check_head(lm: nn.Module) -> None:
    """Refuses a decoder that does more to its logits than `head` does (soft caps, scales), or whose
    MLP is none of single positions."""
    ids = mx.array([[1, 2]])
    embeddings = embedding(lm)(ids)
    whole = lm(ids, input_embeddings=embeddings).astype(mx.float32)
    apart = head(lm, hidden_states(lm, embeddings)[0]).astype(mx.float32)
    last = (mx.array([1]), mx.array([1.0]))
    spared = head(lm, hidden_states(lm, embeddings, wanted=last)[0]).astype(mx.float32)
    scale = mx.abs(whole).max()
    off = mx.maximum(mx.abs(whole - apart).max(), mx.abs(whole - spared)[:, 1].max())
    if (off > 1e-2 * scale).item():
        raise ConfigError(
            f"language models of type {lm.model_type!r} change their logits after the head, or mix "
            "positions in their MLP, which training at supervised positions would miss. Choose "
            "another language model."
        )


def hidden_states(
    lm: nn.Module,
    embeddings: mx.array,
    cache: list[Any] | None = None,
    layers: tuple[int, ...] = (),
    grad_checkpoint: bool = False,
    wanted: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, dict[int, mx.array]]:
    """Runs the trunk on [B, L, D] embeddings.

    Returns the normed last hidden states [B, L, D], and those after each of `layers` (0 is the
    embeddings themselves, k the output of the k-th block, before any norm).

    wanted: flat positions [S] into B * L and which of these count [S] (others are padding). The
    last states are right there, and may be wrong elsewhere: the last block then spares its MLP.
    """
    inner = trunk(lm)
    seen: dict[int, mx.array] = {0: embeddings} if 0 in layers else {}
    count = len(blocks_of(lm))
    if bad := [k for k in layers if not 0 <= k <= count]:
        raise ConfigError(f"layer {bad[0]} does not exist: this language model has 0 to {count}.")

    spared = None if count in layers else wanted

    def wrap(index: int, layer: nn.Module) -> Callable[..., mx.array]:
        call: Callable[..., mx.array] = layer
        if spared is not None and index + 1 == count:
            call = _sparing(layer, *spared)
        if grad_checkpoint:
            call = _checkpointed(layer, call)

        def run(*args: Any, **kwargs: Any) -> mx.array:
            out = call(*args, **kwargs)
            if index + 1 in layers:
                seen[index + 1] = out
            return out

        return run

    with _wrapped(blocks_of(lm), wrap if layers or grad_checkpoint or spared else None):
        if "input_embeddings" in inspect.signature(type(inner).__call__).parameters:
            ids = mx.zeros(embeddings.shape[:2], dtype=mx.int32)
            out = inner(ids, cache=cache, input_embeddings=embeddings)
        else:
            out = inner(embeddings, cache=cache)
    return out, seen


def last_logits(lm: nn.Module, ids: mx.array, embeddings: mx.array, cache: list[Any]) -> mx.array:
    """Logits [1, V] after the last of [L] ids with [L, D] embeddings, whatever the decoder does to
    logits after its head: the head runs at that position alone."""
    owner, inner = decoder(lm), trunk(lm)
    # As an item of the module's dictionary, because an attribute would not be found again.
    dict.__setitem__(owner, "model", _Layer(inner, lambda *a, **k: inner(*a, **k)[:, -1:]))
    try:
        logits = lm(ids[None], cache=cache, input_embeddings=embeddings[None])
    finally:
        dict.__setitem__(owner, "model", inner)
    return logits[:, -1]


@contextmanager
def recomputed(blocks: list[Any]) -> Iterator[None]:
    """For one call, these blocks keep nothing for the backward pass and are run again in it."""
    with _wrapped(blocks, lambda index, block: _checkpointed(block, block)):
        yield


class _Layer:
    """Stands in for a block during one call: runs `call`, and is the block in all else."""

    def __init__(self, block: nn.Module, call: Callable[..., mx.array]):
        self._block, self._call = block, call

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


@contextmanager
def _wrapped(
    blocks: list[Any], wrap: Callable[[int, nn.Module], Callable[..., mx.array]] | None
) -> Iterator[None]:
    # The list is swapped for one call only: names, classes and other models stay as they are.
    if wrap is None:
        yield
        return
    kept = list(blocks)
    blocks[:] = [_Layer(block, wrap(i, block)) for i, block in enumerate(kept)]
    try:
        yield
    finally:
        blocks[:] = kept


def _sparing(layer: nn.Module, positions: mx.array, counts: mx.array) -> Callable[..., mx.array]:
    """The block, with its MLP run at `positions` only and 0 elsewhere; itself if it has none."""
    name = next((name for name in POINTWISE if name in layer), None)
    if name is None:
        return layer
    mlp: Any = layer[name]

    def some(x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        # Padding repeats position 0, which must not be added up.
        out = mlp(flat[positions][None])[0] * counts[:, None].astype(x.dtype)
        return mx.zeros_like(flat).at[positions].add(out).reshape(x.shape)

    def run(*args: Any, **kwargs: Any) -> mx.array:
        # As an item of the module's dictionary, because an attribute would not be found again.
        dict.__setitem__(layer, name, _Layer(mlp, some))
        try:
            return layer(*args, **kwargs)
        finally:
            dict.__setitem__(layer, name, mlp)

    return run


def _checkpointed(layer: nn.Module, call: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def run(*args: Any, **kwargs: Any) -> mx.array:
        randomness: Any = mx.random.state
        start = mx.array(randomness[0])
        calls = 0

        def inner(params: dict[str, Any], *args: Any, **kwargs: Any) -> mx.array:
            nonlocal calls
            calls += 1
            layer.update(params)
            if calls == 1:
                return call(*args, **kwargs)
            # The backward pass must drop what the forward pass dropped, and draw nothing itself.
            after = mx.array(randomness[0])
            randomness[0][:] = start
            out = call(*args, **kwargs)
            randomness[0][:] = after
            return out

        return mx.checkpoint(inner)(layer.trainable_parameters(), *args, **kwargs)

    return run
