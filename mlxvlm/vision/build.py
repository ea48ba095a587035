"""From a vision config to its tower."""

from __future__ import annotations

from ..config import VisionConfig
from .clip import ClipVision
from .internvit import InternVit
from .siglip import SiglipVision

Tower = SiglipVision | ClipVision | InternVit
TOWERS = {
    "siglip_vision_model": SiglipVision,
    "clip_vision_model": ClipVision,
    "internvl_vision": InternVit,
}


def build_vision(config: VisionConfig) -> Tower:
    """The tower that `config.model_type` names, with random weights."""
    return TOWERS[config.model_type](config)
