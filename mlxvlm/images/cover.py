"""MM1.5's tiles: a canvas of whole tiles that covers the picture with the least padding.

    1000 x 600 of 672-pixel tiles      +---+---+---+
    is enlarged to 2016 x 1210 and     | 0 | 1 | 2 |     6 = all of it on a padded square, which
    put in the middle of 2016 x 1344   +---+---+---+         goes last
                                       | 3 | 4 | 5 |
                                       +---+---+---+

Each candidate grid takes the picture as large as fits on its canvas. Of grids that need not shrink
it, the one is taken that leaves least padding then; where all would shrink it, the one that keeps
most pixels; of equals the one with fewer tiles, and of those the one with fewer columns. Always
four tiles, MM1.5's static splitting, is this with one candidate. A row with three pictures or more
has the whole of each alone (McKinzie et al. 2024, "MM1.5", https://arxiv.org/abs/2409.20566; there
is no code, and where the picture lies on its canvas is ours to say: in the middle).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image

from ..config import TilingConfig
from . import preprocess
from .dynamic import grids
from .picture import Cut

Size = tuple[int, int]

# A row with so many pictures splits none of them.
SPLIT_UNDER = 3


def cut(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> its tiles row after row, the whole last: uint8 [image_size, image_size, 3] each;
    and the grid (rows, columns)."""
    grid = choose_grid(image.size, tiling, max_tiles)
    if grid in (None, (1, 1)):
        return _tiles(image, tiling, (1, 1)), (1, 1)
    columns, rows = grid
    views = _tiles(image, tiling, grid)
    if tiling.use_thumbnail:
        views += _tiles(image, tiling, (1, 1))
    return views, (rows, columns)


def plan(size: Size, tiling: TilingConfig, max_tiles: int | None) -> Cut:
    """How a picture of (width, height) is cut, the view of the whole among its views."""
    grid = choose_grid(size, tiling, max_tiles)
    return Cut.into(None if grid == (1, 1) else grid, size, tiling.use_thumbnail)


def choose_grid(
    size: Size, tiling: TilingConfig, max_tiles: int | None = None
) -> tuple[int, int] | None:
    """(columns, rows) for a picture of (width, height); None where `max_tiles` allows no grid."""
    most = tiling.max_tiles if max_tiles is None else min(max_tiles, tiling.max_tiles)
    allowed: Sequence[tuple[int, int]] = tiling.grids or grids(tiling.min_tiles, tiling.max_tiles)
    best, least = None, None
    for columns, rows in allowed:
        if columns * rows > most:
            continue
        scale = _scale(size, (columns, rows), tiling.image_size)
        kept = scale * scale * size[0] * size[1]
        padding = columns * rows * tiling.image_size**2 - kept
        shrinks = scale < 1
        cost = (shrinks, -kept if shrinks else padding)
        if least is None or cost < least:
            best, least = (columns, rows), cost
    return best


def resized(size: Size, grid: tuple[int, int], side: int) -> Size:
    """(width, height) of a picture made as large as fits on a canvas of (columns, rows) tiles, each
    at least as many pixels as tiles, so that of a thread two rows of tiles have something."""
    scale = _scale(size, grid, side)
    width, height = (
        min(max(round(length * scale), tiles), tiles * side)
        for length, tiles in zip(size, grid, strict=True)
    )
    return width, height


def _tiles(image: Image.Image, tiling: TilingConfig, grid: tuple[int, int]) -> list[np.ndarray]:
    """Of a canvas of (columns, rows) with the picture in its middle."""
    side, (columns, rows) = tiling.image_size, grid
    canvas = np.empty((rows * side, columns * side, 3), np.uint8)
    canvas[:] = tiling.background
    width, height = resized(image.size, grid, side)
    left, top = (columns * side - width) // 2, (rows * side - height) // 2
    inner = preprocess.stretch(image, width, height, tiling.resample)
    canvas[top : top + height, left : left + width] = inner
    return preprocess.tiles(canvas, side)


def _scale(size: Size, grid: tuple[int, int], side: int) -> Fraction:
    # Exact: which grids are equally good must not depend on rounding.
    (width, height), (columns, rows) = size, grid
    return min(Fraction(columns * side, width), Fraction(rows * side, height))
