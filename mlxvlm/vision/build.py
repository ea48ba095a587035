"""From a vision config to its tower."""

from __future__ import annotations

from ..config import VisionConfig
from .clip import ClipVision
from .siglip import SiglipVision

TOWERS = {"siglip_vision_model": SiglipVision, "clip_vision_model": ClipVision}


def build_vision(config: VisionConfig) -> SiglipVision | ClipVision:
    """The tower that `config.model_type` names, with random weights."""
    return TOWERS[config.model_type](config)
