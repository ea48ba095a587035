"""The teacher of a model without an encoder (EVE): where its features come from in a run.

It sees each picture as the model does, in the middle of a square, and is frozen: its features may
be cached, by `mlxvlm cache-embeddings -m MODEL`, and then the teacher is not even loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..cache import EmbeddingCache
from ..config import EVE, TilingConfig, VisionConfig
from ..data.feed import Pictures, Several
from ..data.gather import shelf_of
from ..data.mixture import NONE, Source
from ..errors import CacheError, ConfigError, UsageError
from ..model import VLM
from ..vision.encoder import DTYPES, Encoder
from ..weights.load import load_encoder
from .align import Lesson
from .stages import TrainConfig

# CLIP's last block but one, as EVE takes it.
FEATURE_LAYER = -2


def load_teacher(
    vision: VisionConfig,
    tiling: TilingConfig,
    name: str = "",
    dtype: str | mx.Dtype | None = None,
    report: Callable[[Any], Any] | None = None,
) -> Encoder:
    """The frozen encoder that a patch embedding layer learns from; by default its config's."""
    name = name or vision.teacher
    if not name:
        raise ConfigError("this model names no teacher: give one, as a folder or a hub id.")
    encoder = load_encoder(
        name,
        dtype=dtype,
        tiling={"type": "centred", "resize": "squash", "cells": tiling.cells},
        feature_layer=FEATURE_LAYER,
        report=report,
    )
    if encoder.tokens != tiling.cells**2:
        raise ConfigError(
            f"the teacher {name} gives {encoder.tokens} tokens of a picture, and this model has "
            f"{tiling.cells} x {tiling.cells} cells: take one with as many patches."
        )
    return encoder


class Teacher:
    """A run's teacher: an encoder, or a cache of what it said. width: of its features."""

    def __init__(
        self, encoder: Encoder | None, cache: EmbeddingCache | None, width: int, weight: float
    ):
        self.encoder, self.cache, self.width, self.weight = encoder, cache, width, weight

    @property
    def exactness(self) -> str:
        """How exactly its features are known."""
        if self.cache is not None:
            return self.cache.meta["codec"]
        assert self.encoder is not None
        return DTYPES[self.encoder.dtype]

    @classmethod
    def of(
        cls, vlm: VLM, config: TrainConfig, report: Callable[[Any], Any] | None = None
    ) -> Teacher | None:
        """The teacher that a run is to have; None where it learns from none."""
        vision, tiling = vlm.config.vision, vlm.config.tiling
        if vision.model_type != EVE:
            if config.teacher not in ("", NONE) or config.teacher_cache:
                raise UsageError(
                    "--teacher and --teacher-cache are for models whose patches have no encoder of "
                    "their own (EVE), which this one is not."
                )
            return None
        named = config.teacher or (vision.teacher if not config.gives_adapters else NONE)
        if named == NONE or (not named and not config.teacher_cache):
            return None
        if config.gives_adapters:
            raise UsageError(
                f"--teacher belongs to runs that train the model itself, not to --train "
                f"{config.train}, which gives adapters."
            )
        if not config.teacher_cache:
            encoder = load_teacher(vision, tiling, named, report=report)
            return cls(encoder, None, encoder.width, config.teacher_weight)
        cache = EmbeddingCache.open(config.teacher_cache)
        about = cache.meta.get("encoder", {})
        if (about.get("tiling.type"), about.get("tiling.cells")) != ("centred", tiling.cells):
            raise CacheError(
                f"{config.teacher_cache} is no cache of a teacher of this model: make one with "
                "mlxvlm cache-embeddings -m MODEL."
            )
        return cls(None, cache, int(about["hidden_size"]), config.teacher_weight)

    def shelf(self, source: Source, allow_urls: bool) -> Pictures:
        """The pictures of a source as the teacher sees them."""
        source = replace(source, cache="", augment="", max_tiles=0)
        tiling = self.encoder.tiling if self.encoder else TilingConfig()
        return shelf_of(source, self.encoder, self.cache, tiling, allow_urls)

    def lesson(self, pictures: Pictures, found: Sequence[Any]) -> Lesson | None:
        """What the teacher says of a batch's pictures, as `Pictures.of` found them."""
        if not found:
            return None
        one = pictures.each[0] if isinstance(pictures, Several) else pictures
        assert one.teacher is not None
        features = one.teacher.views([picture.taught for picture in found])
        assert isinstance(features, mx.array)
        return Lesson(features, self.weight)
