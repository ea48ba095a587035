"""From a projector config to its module."""

from __future__ import annotations

from ..config import ProjectorConfig, VisionConfig, pooled_tokens
from .attention import AttentionProjector
from .mlp import MLPProjector


def build_projector(
    config: ProjectorConfig, vision: VisionConfig, language_width: int
) -> AttentionProjector | MLPProjector:
    """The projector that `config.type` names, between these two widths, with random weights."""
    tokens = pooled_tokens(vision, config.pool)
    if config.type == "mlp":
        return MLPProjector(config, vision.hidden_size, language_width, vision.grid)
    return AttentionProjector(config, vision.hidden_size, language_width, vision.grid, tokens)
