"""A picture as the encoder sees it, and what the encoder makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Cut(NamedTuple):
    """How a picture is cut into views, which may be known before there are any.

    views: how many. grid: (rows, columns) of tiles that they came from. size: (width, height) of
    the picture, if known.
    """

    views: int
    grid: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None

    @classmethod
    def into(
        cls, grid: tuple[int, int] | None, size: tuple[int, int], with_whole: bool = True
    ) -> Cut:
        """Into (columns, rows) of tiles, and a view of the whole; None: that alone."""
        if grid is None:
            return cls(1, (1, 1), size)
        columns, rows = grid
        return cls(columns * rows + with_whole, (rows, columns), size)


@dataclass
class Picture:
    """Views of one picture, on the host.

    views: list of [H, W, 3] arrays, sizes may differ; uint8 (the encoder normalises) or float32
        (taken as already normalised).
    grid: (rows, columns) of tiles that the views came from.
    size: (width, height) of the picture before tiling, if known.
    sha256: hex digest of the picture's content (file bytes, or pixels), if known.
    taught: in training with a teacher, the same picture as that one takes it.
    """

    views: list[np.ndarray]
    grid: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None
    sha256: str | None = None
    taught: Any = None

    @property
    def cut(self) -> Cut:
        return Cut(len(self.views), self.grid, self.size)


@dataclass
class Features:
    """What a frozen encoder says of one picture: `views` is a list of [tokens, width] arrays.

    The arrays are MLX or NumPy; they differ in length only where the views differ in size.
    projected: whether the projector has run too, and the width is the language model's.
    grids: (rows, columns) of each view's patches, where they differ; None: as the cut says.
    """

    views: list[Any]
    grid: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None
    sha256: str | None = None
    projected: bool = False
    grids: list[tuple[int, int]] | None = None

    @property
    def cut(self) -> Cut:
        return Cut(len(self.views), self.grid, self.size)

    @property
    def array(self) -> Any:
        """[views, tokens, width], where the views agree in size."""
        import mlx.core as mx

        stack = np.stack if isinstance(self.views[0], np.ndarray) else mx.stack
        return stack(self.views)
