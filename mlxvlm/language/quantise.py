"""A language model's layers turned into quantised ones, as mlx-lm's `convert -q` chooses them."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

GROUP = 64


def quantise(language: nn.Module, bits: int) -> None:
    """Linear layers and embeddings become affine ones of `bits`, in place: all but those whose
    width no group of 64 divides, and what the architecture itself leaves out or keeps finer."""
    own = getattr(language, "quant_predicate", None)

    def chosen(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP:
            return False
        return own(path, module) if own else True

    nn.quantize(language, group_size=GROUP, bits=bits, class_predicate=chosen)
