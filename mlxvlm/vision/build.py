"""From a vision config to its tower."""

from __future__ import annotations

from ..config import EVE, VisionConfig
from .clip import ClipVision
from .eve import EveVision
from .internvit import InternVit
from .siglip import SiglipVision

Tower = SiglipVision | ClipVision | InternVit | EveVision
TOWERS = {
    "siglip_vision_model": SiglipVision,
    "clip_vision_model": ClipVision,
    "internvl_vision": InternVit,
    EVE: EveVision,
}


def build_vision(config: VisionConfig) -> Tower:
    """The tower that `config.model_type` names, with random weights."""
    return TOWERS[config.model_type](config)
