"""What a step minimises: cross-entropy at supervised positions, plus auxiliary targets.

    loss = sum of weight * -log p(label) over supervised tokens / sum of weight, over the whole step
         + for each auxiliary target:  weight * mean of -sum of mass * log p(word)
         + of a teacher:               weight * mean over pictures of 1 - mean cosine

Logits exist at supervised positions only: with a vocabulary of 128,256 and 60 answers of 1,024
positions that is 31 MB instead of 525. Past `CHUNK` logits they are made in pieces, so a long
answer costs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..data.buckets import Batch
from ..grids import Views, is_pixels
from ..images.picture import Cut
from ..language.forward import head, head_module, hidden_states, recomputed
from ..language.packed import packed_caches
from ..language.prefix import BranchCache, prefix_caches
from ..model import VLM
from .align import Lesson, PatchAligner, aligning_loss, places
from .stages import TEACHER, AuxiliaryTarget

# logits made at once: 6 Mi values are 24 MB in float32.
CHUNK = 6 * 1024 * 1024


def cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    """float32 loss [S] of logits [S, V]; labels must lie inside the vocabulary."""
    # The CPU path reduces in the logits' own dtype, Metal's kernel in float32 whatever it is given.
    if mx.default_device() == mx.cpu:
        logits = logits.astype(mx.float32)
    return mx.fast.cross_entropy(logits, labels)


def supervised_loss(
    lm: nn.Module, hidden: mx.array, labels: mx.array, weights: mx.array
) -> mx.array:
    """Sum over S positions of weight * cross-entropy, of normed hidden states [S, D].

    In training, gradients come with the value: those of a sum are known as soon, but for a factor.
    So logits are made once, a piece at a time, and become their own gradients where they lie,
    weight * (softmax - one-hot); a checkpoint would make them twice.
    """
    module = head_module(lm)
    size = max(1, CHUNK // module.weight.shape[0])
    cuts = [slice(start, start + size) for start in range(0, hidden.shape[0], size)]
    flat: Any = tree_flatten(module.trainable_parameters())
    names, params = [name for name, _ in flat], [value for _, value in flat]
    total = mx.array(0.0)
    if not lm.training:
        for cut in cuts:
            logits = head(lm, mx.depends(hidden[cut], total))
            total = total + (cross_entropy(logits, labels[cut]) * weights[cut]).sum()
        return total

    def logits_of(part: mx.array, *params: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(names, params, strict=True))))
        return head(lm, part)

    @mx.custom_function
    def whole(hidden: mx.array, *params: mx.array) -> Any:
        total, of_hidden, of_params = mx.array(0.0), [], []
        for cut in cuts:
            # A piece waits for the one before it, whose logits are gone by then.
            part = mx.depends(hidden[cut], [total, *of_hidden[-1:], *of_params])
            logits = logits_of(part, *params)
            values, wrong = _errors(logits.astype(mx.float32), labels[cut], weights[cut])
            # The head is linear, so its logits are not made again.
            _, (state, *rest) = mx.vjp(logits_of, [part, *params], [wrong.astype(logits.dtype)])
            total = total + values.sum()
            of_hidden.append(state)
            pairs = zip(of_params, rest, strict=True)
            of_params = [before + here for before, here in pairs] if of_params else rest
        return total, mx.concatenate(of_hidden), *of_params

    @whole.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(g * cotangents[0].astype(g.dtype) for g in outputs[1:])

    outputs: Any = whole(hidden, *params)
    # Tracing leaves its own arrays there.
    module.update(tree_unflatten(flat))
    return outputs[0]


def _errors(logits: mx.array, labels: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """weight * cross-entropy [S] of float32 logits [S, V], and its gradient in the logits."""
    own = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    values = (mx.logsumexp(logits, axis=-1) - own) * weights
    wrong = mx.softmax(logits, axis=-1).at[mx.arange(len(labels)), labels].add(-1.0)
    return values, wrong * weights[:, None]


def hidden_of(
    vlm: VLM, batch: Batch, visual: mx.array | None, layers: tuple[int, ...], grad_checkpoint: bool
) -> tuple[mx.array, dict[int, mx.array]]:
    """Hidden states [N, D] of a batch, last and after `layers`: flat prefix, then flat tokens.

    The last ones are only right where something is predicted.
    """
    lm = vlm.language
    if batch.prefix is None:
        embeddings = vlm.splice(batch.tokens, visual)
        caches = None if batch.segments is None else packed_caches(lm, batch.segments)
        wanted = mx.array(batch.predict), mx.array(batch.weights != 0)
        last, seen = hidden_states(lm, embeddings, caches, layers, grad_checkpoint, wanted)
        return _flat(last), {k: _flat(h) for k, h in seen.items()}
    caches = prefix_caches(lm)
    shared, seen_shared = hidden_states(lm, vlm.splice(batch.prefix, visual), caches, layers)
    rows = len(batch.tokens) // len(batch.prefix)
    branches = [BranchCache(cache, rows) for cache in caches]
    own, seen_own = hidden_states(lm, vlm.splice(batch.tokens, None), branches, layers)
    joined = {k: mx.concatenate([_flat(seen_shared[k]), _flat(seen_own[k])]) for k in layers}
    return mx.concatenate([_flat(shared), _flat(own)]), joined


def batch_loss(
    vlm: VLM,
    batch: Batch,
    views: Views | None,
    targets: dict[str, AuxiliaryTarget],
    totals: dict[str, float],
    grad_checkpoint: bool = False,
    projected: bool = False,
    lesson: Lesson | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """What a micro-batch adds to its step's loss, times `totals["loss"]`, and the loss's parts.

    The sum over tokens is differentiated, not their mean: in a float16 language model the gradients
    of a mean over thousands of tokens would underflow. `gradients` divides afterwards.

    views: [views, tokens, width] features of the batch's pictures, or [views, H, W, 3] normalised
    pixels where the encoder trains; lists where views differ in size. totals: what each part is
    divided by, over the whole step: "loss" the labels' weights, and each target's count. projected:
    the features have been through the projector already. lesson: of a teacher, for a model with an
    `aligner`.
    """
    layers = tuple(sorted({targets[name].layer for name in batch.targets if name in targets}))
    if lesson is not None:
        layers = tuple(sorted({*layers, *vlm["aligner"].layers}))
    visual = (
        None if views is None else visual_of(vlm, views, batch.cuts, projected, grad_checkpoint)
    )
    hidden, seen = hidden_of(vlm, batch, visual, layers, grad_checkpoint)
    chosen = hidden[mx.array(batch.predict)]
    labels, weights = mx.array(batch.labels), mx.array(batch.weights)
    total = supervised_loss(vlm.language, chosen, labels, weights)
    parts = {"loss": total / totals["loss"]}
    for name, wanted in batch.targets.items():
        if name not in targets:
            continue
        state = seen[targets[name].layer][mx.array(wanted.positions)]
        named = _named(vlm.language, state, mx.array(wanted.words), mx.array(wanted.masses))
        parts[name] = named / totals[name]
        total = total + totals["loss"] * targets[name].weight * parts[name]
    if lesson is not None:
        # As transformers counts hidden states: the last of them is normed.
        aligner: PatchAligner = vlm["aligner"]
        states = seen | {aligner.num_layers: hidden}
        found = places(batch, vlm.config)
        parts[TEACHER] = aligning_loss(aligner, states, found, lesson.features) / totals[TEACHER]
        total = total + totals["loss"] * lesson.weight * parts[TEACHER]
    return total, parts


def visual_of(
    vlm: VLM,
    views: Views,
    cuts: Sequence[Cut],
    projected: bool,
    grad_checkpoint: bool = False,
) -> mx.array:
    """[visual tokens, D] that the language model sees, of what `Pictures.views` gives of pictures
    cut so."""
    if projected and isinstance(views, mx.array):
        return vlm.merge(views, cuts)
    if is_pixels(views) and grad_checkpoint:
        with recomputed(vlm.vision.encoder.layers):
            views = vlm.encoder.run_all(views)
    elif is_pixels(views):
        views = vlm.encoder.run_all(views)
    return vlm.project_views(views, cuts)


def gradients(
    value_and_grad: Callable[..., Any], vlm: VLM, *arguments: Any
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Gradients of one micro-batch's part of the step's loss, by name, and the loss's parts.

    value_and_grad: of `batch_loss` for this model; arguments: as `batch_loss` takes them.
    """
    (_, parts), tree = value_and_grad(vlm, *arguments)
    share = 1 / arguments[3]["loss"]
    flat: Any = tree_flatten(tree)
    return {name: g * mx.array(share, g.dtype) for name, g in flat}, parts


def count(batches: list[Batch]) -> dict[str, float]:
    """`totals` of a step: what its parts are divided by."""
    totals: dict[str, float] = {"loss": sum(b.total_weight for b in batches)}
    for batch in batches:
        for name, wanted in batch.targets.items():
            here = float(np.count_nonzero(wanted.masses.sum(axis=1)))
            totals[name] = totals.get(name, 0.0) + here
    return totals


def _named(lm: nn.Module, state: mx.array, words: mx.array, masses: mx.array) -> mx.array:
    """Sum of cross-entropies between what states [S, D] name and the words' masses [S, K]."""
    logits = head(lm, mx.fast.rms_norm(state, None, 1e-5)).astype(mx.float32)
    logs = mx.take_along_axis(logits, words, axis=-1)
    logs = logs - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(logs * masses).sum()


def _flat(h: Any) -> mx.array:
    return h.reshape(-1, h.shape[-1])
