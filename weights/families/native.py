"""Our own layout, as `save` writes it: names as they are, config.json with the five choices."""

from __future__ import annotations

from mlxvlm.config import MODEL_TYPE, ModelConfig
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = (MODEL_TYPE,)


def rename(key: str) -> str | None:
    return key


def model(checkpoint: Checkpoint) -> ModelConfig:
    return ModelConfig.from_dict(checkpoint.config)
