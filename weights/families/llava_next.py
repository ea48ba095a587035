"""LLaVA-NeXT (LLaVA-1.6): LLaVA's parts and layouts, any-resolution tiles, and `image_newline`."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxvlm.config import TILINGS, ModelConfig
from mlxvlm.errors import ConfigError
from mlxvlm.weights.families import llava
from mlxvlm.weights.families.towers import processor
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = ("llava_next",)


def rename(key: str) -> str | None:
    if key.removeprefix("model.") == "image_newline":
        return "projector.image_newline"
    return llava.rename(key)


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices, as transformers reads them: of equal grids the first, a pinpoint's height
    before its width; the prompt's layout is left to who knows the tokenizer."""
    config = llava.model(checkpoint)
    side = config.vision.image_size
    default = [[rows * side, columns * side] for columns, rows in TILINGS["anyres"]["grids"]]
    pinpoints = checkpoint.config.get("image_grid_pinpoints") or default
    theirs = processor(checkpoint.folder).get("image_grid_pinpoints") or pinpoints
    if theirs != pinpoints:
        raise ConfigError(
            f"{checkpoint.folder}: image_grid_pinpoints are {pinpoints} in config.json, but "
            f"{theirs} in the image processor's file: they must be the same."
        )
    return dataclasses.replace(
        config,
        tiling=dataclasses.replace(
            config.tiling,
            **{**TILINGS["anyres"], "grids": tuple((w, h) for h, w in grids(pinpoints, side))},
        ),
        prompt=dataclasses.replace(config.prompt, merge="spatial_unpad"),
    )


def grids(pinpoints: Any, side: int) -> list[tuple[int, int]]:
    """Pinpoints in tiles: pairs as they are written, of pixels."""
    good = isinstance(pinpoints, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and all(type(n) is int and n > 0 and n % side == 0 for n in point)
        for point in pinpoints
    )
    if not good or not pinpoints:
        raise ConfigError(
            f"image_grid_pinpoints (={pinpoints}) must be pairs of multiples of the tower's "
            f"{side} pixels."
        )
    return [(a // side, b // side) for a, b in pinpoints]
