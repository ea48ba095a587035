"""InternVL's dynamic tiles: a grid whose shape is close to the picture's, and the whole once more.

    1280 x 720, at most 6 tiles        +---+---+
    is stretched to 2 x 1 tiles,       | 0 | 1 |     2 = all of it as one more view
    768 x 384 pixels                   +---+---+

Every grid of min_tiles to max_tiles tiles is a candidate, and the one whose columns / rows is
nearest to the picture's width / height is taken. Of grids that are as near (2 x 1 and 4 x 2), a
larger one is taken if the picture has more than half of its pixels. Rule and order are those of
InternVL 2.5 (`dynamic_preprocess` in internvl_chat's dataset.py) and of GotOcr2ImageProcessor in
transformers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from ..config import TilingConfig
from . import preprocess
from .picture import Cut


def cut(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> its tiles row after row, the thumbnail last: uint8 [image_size, image_size, 3]
    each; and the grid (rows, columns)."""
    side, resample = tiling.image_size, tiling.resample
    columns, rows = choose_grid(image.size, tiling, max_tiles)
    canvas = preprocess.stretch(image, columns * side, rows * side, resample)
    views = preprocess.tiles(canvas, side)
    if _with_thumbnail(len(views), tiling):
        views.append(preprocess.squash(image, side, resample))
    return views, (rows, columns)


def plan(size: tuple[int, int], tiling: TilingConfig, max_tiles: int | None) -> Cut:
    """How a picture of (width, height) is cut, its thumbnail among the views."""
    columns, rows = choose_grid(size, tiling, max_tiles)
    tiles = columns * rows
    return Cut(tiles + _with_thumbnail(tiles, tiling), (rows, columns), size)


def choose_grid(
    size: tuple[int, int], tiling: TilingConfig, max_tiles: int | None = None
) -> tuple[int, int]:
    """(columns, rows) for a picture of (width, height), of at most `max_tiles` tiles."""
    most = tiling.max_tiles if max_tiles is None else min(max_tiles, tiling.max_tiles)
    width, height = size
    best, least = (1, 1), math.inf
    for columns, rows in grids(min(tiling.min_tiles, most), most):
        # In floats, as there: which grids are equally near depends on their rounding.
        off = abs(width / height - columns / rows)
        enough = width * height > 0.5 * tiling.image_size**2 * columns * rows
        if off < least or (off == least and enough):
            best, least = (columns, rows), off
    return best


def _with_thumbnail(tiles: int, tiling: TilingConfig) -> bool:
    return tiling.use_thumbnail and tiles > 1


@lru_cache
def grids(least: int, most: int) -> list[tuple[int, int]]:
    """Every (columns, rows), fewer tiles first; of as many tiles, fewer columns first."""
    found = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= least
    ]
    return sorted(found, key=math.prod)
