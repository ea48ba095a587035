"""SigLIP, and SigLIP 2 at a fixed resolution: the vision tower alone, or with the text tower."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.vision.siglip import SiglipTextConfig
from mlxvlm.weights.families.towers import preprocessing, vision_config
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = ("siglip", "siglip_vision_model")
# What belongs to the text side of a whole SigLIP.
TEXT = ("text_model.", "logit_scale", "logit_bias")


def rename(key: str) -> str | None:
    if key.startswith(TEXT):
        return None
    return "vision." + key.removeprefix("vision_model.")


def vision(checkpoint: Checkpoint) -> tuple[VisionConfig, TilingConfig]:
    """The last layer after the final norm feeds the projector, unless the caller says otherwise."""
    raw = checkpoint.config
    if raw["model_type"] == "siglip":
        raw = {"model_type": "siglip_vision_model", **raw.get("vision_config", {})}
    config = vision_config(raw, vision_feature_layer=-1, vision_feature_norm=True)
    tiling, mean, std = preprocessing(checkpoint.folder, config)
    return dataclasses.replace(config, image_mean=mean, image_std=std), tiling


def text(config: dict[str, Any]) -> SiglipTextConfig:
    """The text tower's config; what config.json does not list is at transformers' defaults."""
    raw = config.get("text_config", {})
    names = {f.name for f in dataclasses.fields(SiglipTextConfig)}
    return SiglipTextConfig(**{k: v for k, v in raw.items() if k in names and v is not None})
