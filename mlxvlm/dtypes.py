"""What a module computes in."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def dtype_of(module: nn.Module) -> mx.Dtype:
    """The dtype of a module's first floating parameter; quantised weights are integers."""
    leaves: list[Any] = [v for _, v in tree_flatten(module.parameters())]
    return next(v.dtype for v in leaves if mx.issubdtype(v.dtype, mx.floating))
