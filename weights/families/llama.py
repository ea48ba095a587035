"""A language model's own repository: Llama, and every other decoder that mlx-lm knows."""

from __future__ import annotations

from typing import Any

from mlxvlm.language.load import translate
from mlxvlm.weights.folder import Checkpoint


def rename(key: str) -> str | None:
    return "language." + key


def language(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its config.json in mlx-lm's terms, without how the tensors are stored."""
    stored = ("quantization", "quantization_config")
    return translate({k: v for k, v in checkpoint.config.items() if k not in stored})
