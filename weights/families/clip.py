"""CLIP's vision tower, alone or out of a whole CLIP."""

from __future__ import annotations

import dataclasses

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.weights.families.towers import preprocessing, vision_config
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = ("clip", "clip_vision_model")
# What belongs to the rest of a whole CLIP, or of a SigLIP where the two are read alike.
REST = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias")


def rename(key: str) -> str | None:
    if key.startswith(REST):
        return None
    return "vision." + key.removeprefix("vision_model.")


def vision(checkpoint: Checkpoint) -> tuple[VisionConfig, TilingConfig]:
    """LLaVA's choice: the last block but one, no final norm, no class token."""
    raw = checkpoint.config
    if raw["model_type"] == "clip":
        raw = {"model_type": "clip_vision_model", **raw.get("vision_config", {})}
    config = vision_config(
        raw,
        vision_feature_layer=-2,
        vision_feature_norm=False,
        vision_feature_select_strategy="default",
    )
    tiling, mean, std = preprocessing(checkpoint.folder, config)
    return dataclasses.replace(config, image_mean=mean, image_std=std), tiling
