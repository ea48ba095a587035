"""The frozen half and a frozen projector behind it, as one encoder: what the language model sees.

A cache of it holds `tokens_per_view` embeddings a view, of the language model's width. That pays
where the projector trains no more and pools: nothing is left to run before the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import mlx.nn as nn

from .config import ModelConfig
from .grids import batched, feature_grids, project
from .images.picture import Features, Picture
from .vision.encoder import Encoder, digest_of, tensors_of


class ProjectedEncoder:
    """Looks as its encoder does, and encodes through the projector. tokens and width are of a view
    as the language model takes it. choices: the whole model's."""

    def __init__(self, encoder: Encoder, projector: nn.Module, config: ModelConfig, width: int):
        self.encoder, self.projector = encoder, projector
        self.choices, self.tokens = config, config.tokens_per_view
        self.tiling, self.width = encoder.tiling, width

    def look(
        self, images: Iterable[Any], max_tiles: int | None = None, allow_urls: bool = False
    ) -> list[Picture]:
        return self.encoder.look(images, max_tiles, allow_urls)

    def shape_of(self, size: tuple[int, ...]) -> tuple[int, int]:
        """[tokens, width] of what a view of [H, W, 3] gives."""
        return self.tokens, self.width

    def encode(self, pictures: list[Picture]) -> list[Features]:
        """Features of pictures, lazy: [tokens, width] a view, in the projector's dtype."""
        found = self.encoder.encode(pictures)
        for features in found:
            grids = feature_grids(self.tiling, [features])
            views = project(self.projector, batched(features.views), grids)
            features.views, features.projected = list(views), True
        return found

    def identity(self) -> dict[str, Any]:
        """The encoder's identity, the projector's choices, because heads or an adaptive pooling
        are in no tensor, and its tensors by name, shape, dtype and bytes."""
        choice = dataclasses.asdict(self.choices.projector)
        choices = {f"projector.{k}": v for k, v in choice.items()}
        projector = digest_of(tensors_of(self.projector))
        return {**self.encoder.identity(), "at": "projector", "projector": projector, **choices}
