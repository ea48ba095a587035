"""From a projector config to its module."""

from __future__ import annotations

import mlx.core as mx

from ..config import ProjectorConfig, VisionConfig, pooled_side, pooled_tokens
from .attention import AttentionProjector
from .c_abstractor import CAbstractor
from .mlp import MLPProjector
from .resampler import Resampler
from .spatial_resampler import SpatialResampler

Projector = AttentionProjector | MLPProjector | CAbstractor | Resampler | SpatialResampler
ON_GRIDS = {
    "c_abstractor": CAbstractor,
    "resampler": Resampler,
    "spatial_resampler": SpatialResampler,
}


def build_projector(
    config: ProjectorConfig, vision: VisionConfig, language_width: int, newline: bool = False
) -> Projector:
    """The projector that `config.type` names, between these two widths, with random weights.

    newline: with `image_newline` [language_width], which a merge puts behind each row of tokens.
    """
    built = _build(config, vision, language_width)
    if newline:
        # As long as a word's embedding: LLaVA-NeXT's N(0, 1 / width).
        built.image_newline = mx.random.normal((language_width,), scale=language_width**-0.5)
    return built


def _build(config: ProjectorConfig, vision: VisionConfig, language_width: int) -> Projector:
    width, grid = vision.hidden_size, vision.grid
    tokens = pooled_tokens(vision, config.pool)
    if config.type == "mlp":
        return MLPProjector(config, width, language_width, grid)
    if config.type in ON_GRIDS:
        pooled_side(vision, config.pool, f"projector {config.type!r}")
        return ON_GRIDS[config.type](config, width, language_width, grid)
    return AttentionProjector(config, width, language_width, grid, tokens)
