"""One training step as a graph: what it holds in memory, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config import is_adapter, pooled_tokens
from ..data.buckets import Batch
from ..grids import Views, batched, view_grids
from ..images.picture import Picture
from ..images.tiling import view_sizes
from ..language.forward import head_module
from ..language.load import language_width
from ..model import VLM
from ..train.losses import batch_loss, count, gradients
from ..train.optimizer import Optimizer, clip
from ..train.stages import TrainConfig
from .memory import Peak, peak
from .trace import Graph, trace

# What a step's memory is made of, in the order in which it is told.
PARTS = {
    "encoder": "vision encoder",
    "projector": "projector",
    "language": "language model",
    "adapters": "adapters",
    "optimizer": "the optimizer's state",
    "gradients": "gradients",
    "features": "features of the pictures",
    "encoding": "running the encoder",
    "logits": "logits, where supervised",
    "activations": "activations",
}


@dataclass
class Step:
    """What one step takes. flops: of all its micro-batches; encoder_flops: the encoder's share.

    peak: with its parts, by the names in `PARTS`. weights: bytes of each part of the model and of
    the optimizer, which are there before the step and after it; trained: of what trains.
    """

    peak: Peak
    flops: float
    encoder_flops: float
    tokens: int
    weights: dict[str, int] = field(default_factory=dict)
    trained: int = 0


def step_of(
    vlm: VLM, config: TrainConfig, batch: Batch, views: int, projected: bool = False
) -> Step:
    """One step of a prepared model (`train.parts`), all of whose micro-batches are like `batch`.

    A model without its tower (`del vlm.vision`) has features from caches. views: of the batch's
    pictures. projected: the caches hold what the projector gives.
    """
    vlm.train()
    arrays: Any = tree_flatten(vlm.parameters())
    names = [name for name, _ in arrays]
    trained = dict(tree_flatten(vlm.trainable_parameters()))
    optimizer = Optimizer(config, trained)
    moments = optimizer.to_arrays()
    several = config.grad_accumulation_steps > 1
    sums = {name: mx.zeros(v.shape, v.dtype) for name, v in trained.items()} if several else {}
    features = _features(vlm, batch, views, projected)
    inputs = [v for _, v in arrays] + list(moments.values()) + list(sums.values()) + features
    cuts = np.cumsum([len(arrays), len(moments), len(sums)])
    order = list(trained)
    counts: dict[str, int] = {}

    def run(*given: mx.array) -> list[mx.array]:
        weights, state, before, found = (
            list(given[i:j]) for i, j in zip([0, *cuts], [*cuts, len(given)], strict=True)
        )
        vlm.update(tree_unflatten(list(zip(names, weights, strict=True))))
        optimizer.from_arrays(dict(zip(moments, state, strict=True)))
        own = dict(tree_flatten(vlm.trainable_parameters()))
        seen: Views | None = found if len(found) > 1 else found[0] if found else None
        if seen is None:
            seen = _views(vlm, batch, views, config.trains_vision)
        flat, parts = gradients(
            nn.value_and_grad(vlm, batch_loss),
            vlm,
            batch,
            seen,
            config.targets,
            count([batch]),
            config.grad_checkpoint,
            projected,
        )
        sums = {n: g + s for (n, g), s in zip(flat.items(), before, strict=True)} if before else {}
        grads, norm = clip(sums or flat, config.max_grad_norm)
        updated = optimizer.apply(grads, own, 1.0)
        results = {
            "loss": list(parts.values()),
            "flat": list(flat.values()),
            "sums": list(sums.values()),
            "views": [seen] if isinstance(seen, mx.array) else seen or [],
            "grads": list(grads.values()),
            "norm": [norm],
            "updated": [updated[n] for n in order],
            "state": list(optimizer.to_arrays().values()),
        }
        counts.update((k, len(v)) for k, v in results.items())
        return [a for found in results.values() for a in found]

    randomness: Any = mx.random.state
    state = mx.array(randomness[0])
    try:
        graph = trace(run, inputs)
    finally:
        vlm.update(tree_unflatten(arrays))
        randomness[0][:] = state
    ends = np.cumsum([0, *counts.values()])
    found = {name: graph.outputs[i:j] for name, i, j in zip(counts, ends, ends[1:], strict=False)}
    labels = _Labels(vlm, graph, found, names, cuts, set(trained))
    frozen = [a for a, name in zip(graph.inputs, names, strict=False) if name not in trained]
    given = graph.inputs[: cuts[1]]
    most = peak(
        graph,
        _phases(several, found),
        labels,
        held=frozen,
        # Python keeps the weights and moments while gradients are made, and then lets go of them.
        dropped=[*(set(given) - set(frozen)), *found["grads"]],
    )
    encoder = graph.behind(found["views"]) if not features else set()
    micro = config.grad_accumulation_steps
    sizes: dict[str, int] = {}
    for number in graph.inputs[: cuts[1]]:
        sizes[labels(number)] = sizes.get(labels(number), 0) + graph.nbytes(number)
    return Step(
        most,
        micro * graph.flops(),
        micro * graph.flops(encoder),
        micro * batch.tokens.size + (micro * batch.prefix.size if batch.prefix is not None else 0),
        sizes,
        sum(value.nbytes for value in trained.values()),
    )


def _phases(several: bool, found: dict[str, list[int]]) -> list[list[int]]:
    """What is evaluated together, one after the other: micro-batch, norm, update."""
    norm = [*found["norm"], *found["loss"]]
    update = [*found["updated"], *found["state"]]
    first = [[*found["sums"], *found["loss"]]] if several else []
    return [*first, norm, update]


def _features(vlm: VLM, batch: Batch, views: int, projected: bool) -> list[mx.array]:
    """What a cache gives for so many views, one array, or one a view where they differ; nothing
    without a cache."""
    if not views or "vision" in vlm:
        return []
    config = vlm.config
    if projected:
        width = language_width(config.language)
        return [mx.zeros((views, config.tokens_per_view, width))]
    width = config.vision.hidden_size
    if config.varied:
        return [mx.zeros((h * w, width)) for h, w in view_grids(config.tiling, batch.cuts)]
    tokens = pooled_tokens(config.vision, config.encoder_pool)
    return [mx.zeros((views, tokens, width))]


def _views(vlm: VLM, batch: Batch, views: int, pixels: bool) -> Views | None:
    """What `Pictures.views` gives for so many blank ones."""
    if not views:
        return None
    tiling = vlm.config.tiling
    sizes = [(tiling.image_size, tiling.image_size)] * views
    if tiling.varied:
        sizes = [size for cut in batch.cuts for size in view_sizes(cut, tiling)]
    blank = Picture([np.zeros((height, width, 3), np.uint8) for width, height in sizes])
    if pixels:
        return vlm.encoder.pixels([blank])
    return batched([v for found in vlm.encoder.encode([blank]) for v in found.views])


class _Labels:
    """Which part of `PARTS` an array belongs to."""

    def __init__(
        self,
        vlm: VLM,
        graph: Graph,
        found: dict[str, list[int]],
        names: Sequence[str],
        cuts: Any,
        trained: set[str],
    ):
        self.known: dict[int, str] = {}
        self.shapes = graph.shapes
        self.vocabulary = head_module(vlm.language).weight.shape[0]
        moments = graph.inputs[cuts[0] : cuts[1]]
        for place in graph.behind(found["views"]) if cuts[2] == len(graph.inputs) else ():
            self.known.update(dict.fromkeys(graph.ops[place].outputs, "encoding"))
        gradients = {*found["flat"], *found["sums"], *found["grads"]}
        self.known.update(
            dict.fromkeys([*gradients, *graph.inputs[cuts[1] : cuts[2]]], "gradients")
        )
        self.known.update(dict.fromkeys([*found["views"], *graph.inputs[cuts[2] :]], "features"))
        self.known.update(dict.fromkeys([*found["state"], *moments], "optimizer"))
        mine = [name for name in names if name in trained]
        given = [*zip(graph.inputs, names, strict=False), *zip(found["updated"], mine, strict=True)]
        for number, name in given:
            part = name.split(".")[0]
            part = "encoder" if part == "vision" else part
            self.known[number] = "adapters" if is_adapter(name) else part

    def __call__(self, number: int) -> str:
        if number in self.known:
            return self.known[number]
        shape = self.shapes[number]
        if len(shape) > 1 and shape[-1] == self.vocabulary:
            return "logits"
        return "activations"
