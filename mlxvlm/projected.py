"""The frozen half and a frozen projector behind it, as one encoder: what the language model sees.

A cache of it holds `tokens_per_view` embeddings a view, of the language model's width. That pays
where the projector trains no more and pools: nothing is left to run before the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import ModelConfig
from .dtypes import dtype_of
from .images.picture import Features, Picture
from .vision.encoder import Encoder, digest_of, tensors_of


class ProjectedEncoder:
    """Looks as its encoder does, and encodes through the projector. tokens and width are of a view
    as the language model takes it."""

    def __init__(self, encoder: Encoder, projector: nn.Module, config: ModelConfig, width: int):
        self.encoder, self.projector = encoder, projector
        self.choice, self.tokens = config.projector, config.tokens_per_view
        self.tiling, self.width = encoder.tiling, width

    def look(
        self, images: Iterable[Any], max_tiles: int | None = None, allow_urls: bool = False
    ) -> list[Picture]:
        return self.encoder.look(images, max_tiles, allow_urls)

    def encode(self, pictures: list[Picture]) -> list[Features]:
        """Features of pictures, lazy: [tokens, width] a view, in the projector's dtype."""
        dtype = dtype_of(self.projector)
        found = self.encoder.encode(pictures)
        for features in found:
            views = mx.stack(features.views).astype(dtype)
            features.views, features.projected = list(self.projector(views)), True
        return found

    def identity(self) -> dict[str, Any]:
        """The encoder's identity, the projector's choices, because heads or an adaptive pooling
        are in no tensor, and its tensors by name, shape, dtype and bytes."""
        choices = {f"projector.{k}": v for k, v in dataclasses.asdict(self.choice).items()}
        projector = digest_of(tensors_of(self.projector))
        return {**self.encoder.identity(), "at": "projector", "projector": projector, **choices}
