"""A picture as the encoder sees it, and what the encoder makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Picture:
    """Views of one picture, on the host.

    views: list of [H, W, 3] arrays, sizes may differ; uint8 (the encoder normalises) or float32
        (taken as already normalised).
    grid: (rows, columns) of tiles that the views came from.
    size: (width, height) of the picture before tiling, if known.
    sha256: hex digest of the picture's content (file bytes, or pixels), if known.
    """

    views: list[np.ndarray]
    grid: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None
    sha256: str | None = None


@dataclass
class Features:
    """What a frozen encoder says of one picture: `views` is a list of [tokens, width] arrays.

    The arrays are MLX or NumPy; they differ in length only where the views differ in size.
    projected: whether the projector has run too, and the width is the language model's.
    """

    views: list[Any]
    grid: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None
    sha256: str | None = None
    projected: bool = False

    @property
    def array(self) -> Any:
        """[views, tokens, width], where the views agree in size."""
        import mlx.core as mx

        stack = np.stack if isinstance(self.views[0], np.ndarray) else mx.stack
        return stack(self.views)
