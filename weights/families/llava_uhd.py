"""LLaVA-UHD as its authors save it: LLaVA's original layout, with another projector.

model.mm_projector.{query, pos_embed, kv_proj, attn, ln_q, ln_kv, ln_post, proj}
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxvlm.config import TILINGS, ModelConfig, ProjectorConfig
from mlxvlm.weights.families import llava_original
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = llava_original.MODEL_TYPES
PROJECTOR = "adapt_spatial_resampler"
PREFIX = "model.mm_projector."

assemble = llava_original.assemble
layout = llava_original.layout


def is_uhd(raw: dict[str, Any]) -> bool:
    """Whether a config.json in LLaVA's original layout is LLaVA-UHD's."""
    return llava_original.is_original(raw) and raw.get("mm_projector_type") == PROJECTOR


def rename(key: str) -> str | None:
    if key.startswith(PREFIX):
        return "projector." + key.removeprefix(PREFIX)
    return llava_original.rename(key)


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices; the prompt's layout is `layout`'s."""
    # Slices are cut whatever config.json says of an aspect ratio.
    own = {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "square"}
    config = llava_original.model(
        dataclasses.replace(checkpoint, config={**checkpoint.config, **own})
    )
    # How many queries there are, only their tensor says.
    query = checkpoint.tensors.get(PREFIX + "query")
    slices = {**TILINGS["slices-uhd"], "patch_size": config.vision.patch_size}
    return dataclasses.replace(
        config,
        tiling=dataclasses.replace(config.tiling, **slices),
        vision=dataclasses.replace(config.vision, positions="bicubic"),
        projector=ProjectorConfig("spatial_resampler", num_query_tokens=query.shape[0])
        if query
        else ProjectorConfig("spatial_resampler"),
        prompt=dataclasses.replace(config.prompt, merge="uhd"),
    )
