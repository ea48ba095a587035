"""A run looked at before it starts: its data, its model in outline, and its heaviest step."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..data.feed import Feed
from ..data.samples import Sample
from ..data.split import split
from ..language.quantise import quantise
from ..merge import visual_tokens
from ..model import VLM
from ..projectors.pool import Pool
from ..train.parts import prepare_parts
from ..train.rows import check_rows, feed_of, gather_rows, open_caches
from ..train.stages import TrainConfig
from ..weights.load import outline
from .batches import heaviest, num_positions, num_views, with_fewer_visual
from .step import Step, step_of


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run, and what may be changed in its model. bits: 4 for a quantised language model, 0 as it
    is. cached: all features come from caches. pool: the projector's, "" as it is."""

    config: TrainConfig
    bits: int = 0
    cached: bool = False
    pool: str = ""


class Study:
    """What is known of a run without reading a weight or writing a byte.

    here: the model's tensors are on this disk. gathered: its rows, and those that are left out.
    resized: how the run's pictures become squares and how the model's own do, where they differ.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.vlm, self.here = outline(config.model)
        before = self.vlm.config.tiling.resize
        self.vlm.config.override(config.resize, config.layout)
        now = self.vlm.config.tiling.resize
        self.resized = (now, before) if now != before else None
        sources = config.all_sources
        caches, self.projected = open_caches(config, sources)
        for cache in caches.values():
            cache.require_tiling(self.vlm.config.tiling)
        self.gathered = gather_rows(
            config, self.vlm, self.vlm.encoder, caches, sources, config.mixture
        )
        check_rows(config, self.gathered)
        self.samples = self.gathered.samples
        if config.val_split:
            self.samples = split(self.samples, config.val_split, config.seed)[0]
        self.base = Variant(config, cached=all(source.cache for source in sources))
        self.models: dict[Any, VLM] = {}
        self.steps_taken: dict[Any, Step] = {}
        self.feed = self._feed(self.base)
        sizes = [num_positions(self.feed, micro) for micro in self.feed.plan.epoch(0)]
        micro = config.grad_accumulation_steps
        self.steps = config.iters or math.ceil(self.feed.batches(config.epochs) / micro)
        self.tokens = self.steps * micro * sum(sizes) / len(sizes)
        self.lengths = sorted(sample.length for sample in self.samples)
        self.quantised = any(isinstance(m, nn.QuantizedLinear) for m in self.vlm.language.modules())
        self.num_pictures = len({(s.source, name) for s in self.samples for name in s.images})

    def step(self, variant: Variant | None = None) -> Step:
        """The heaviest step of a run."""
        variant = variant or self.base
        config = variant.config
        key = (self._key(variant), config.batch_size, config.grad_accumulation_steps)
        key += (config.max_seq_length, config.grad_checkpoint)
        if key not in self.steps_taken:
            vlm, feed = self._model(variant), self._feed(variant)
            found = [
                step_of(vlm, config, feed.collate(micro), num_views(feed, micro), self.projected)
                for micro in heaviest(feed)
            ]
            self.steps_taken[key] = max(found, key=lambda step: step.peak.bytes)
        return self.steps_taken[key]

    def row_flops(self, variant: Variant) -> float:
        """Operations that a row takes, on average over an epoch."""
        step, feed = self.step(variant), self._feed(variant)
        tokens = sum(num_positions(feed, micro) for micro in feed.plan.epoch(0))
        return step.flops / step.tokens * tokens / len(feed.samples)

    def rows(self, variant: Variant) -> int:
        """Rows that are short enough for it."""
        return sum(s.length <= variant.config.max_seq_length for s in self._samples(variant))

    def _key(self, variant: Variant) -> tuple[Any, ...]:
        return (variant.config.train, variant.bits, variant.cached, variant.pool)

    def _model(self, variant: Variant) -> VLM:
        key = self._key(variant)
        if key not in self.models:
            vlm = outline(self.config.model)[0]
            if variant.pool:
                vlm.config.projector.pool = variant.pool
                vlm.projector.pool = Pool(variant.pool, vlm.config.vision.grid)
            if variant.bits:
                quantise(vlm.language, variant.bits)
            prepare_parts(vlm, variant.config)
            if variant.cached:
                del vlm.vision
            self.models[key] = vlm
        return self.models[key]

    def _samples(self, variant: Variant) -> list[Sample]:
        if not variant.pool:
            return self.samples
        visual = partial(visual_tokens, self._model(variant).config)
        return [with_fewer_visual(sample, visual) for sample in self.samples]

    def _feed(self, variant: Variant) -> Feed:
        config = variant.config
        short = [s for s in self._samples(variant) if s.length <= config.max_seq_length]
        return feed_of(config, self._model(variant), short, self.gathered.pictures, config.loss)


def stored_bytes(vlm: VLM) -> int:
    """Bytes of all weights as they are stored."""
    arrays: Any = tree_flatten(vlm.parameters())
    return sum(v.nbytes for _, v in arrays if isinstance(v, mx.array))
