"""InternViT, InternVL's vision tower, alone: in OpenGVLab's layout, or in transformers'."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.weights.families.towers import preprocessing, vision_config
from mlxvlm.weights.folder import Checkpoint

OPENGVLAB = "intern_vit_6b"  # the 300M's too
MODEL_TYPES = (OPENGVLAB, "internvl_vision")

# transformers' name of a tensor, or a part of it -> OpenGVLab's, which are ours.
NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "encoder.layer.": "encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_1": ".ls1",
    ".lambda_2": ".ls2",
}
# OpenGVLab's names of fields, and what a config.json of theirs leaves out.
FIELDS = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
SILENT = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}


def rename(key: str) -> str | None:
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return "vision." + key


def vision(checkpoint: Checkpoint) -> tuple[VisionConfig, TilingConfig]:
    """InternVL's choice: the last block's patches; a picture is one view, unless asked for more."""
    config = tower(checkpoint.config)
    tiling, mean, std = preprocessing(checkpoint.folder, config)
    return dataclasses.replace(config, image_mean=mean, image_std=std), tiling


def tower(raw: dict[str, Any], layer: int = -1, strategy: str = "default") -> VisionConfig:
    """The tower of a `vision_config` in either layout."""
    if raw.get("model_type", OPENGVLAB) == OPENGVLAB:
        raw = {FIELDS.get(name, name): value for name, value in {**SILENT, **raw}.items()}
        raw["model_type"] = "internvl_vision"
    return vision_config(
        raw,
        vision_feature_layer=layer,
        vision_feature_norm=False,
        vision_feature_select_strategy=strategy,
    )
