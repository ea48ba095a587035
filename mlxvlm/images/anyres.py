"""LLaVA's any-resolution tiles: a canvas of whole tiles that loses least of the picture.

    640 x 480 of 336-pixel tiles       +---+---+
    is resized to 672 x 504 and put    | 1 | 2 |     0 = all of it, stretched to one tile, which
    in the middle of 672 x 672         +---+---+         goes first
                                       | 3 | 4 |
                                       +---+---+

Of the grids allowed, that one is taken which keeps most pixels of the picture, and of those the one
with the smallest canvas; of equals the first. Rule, roundings and order are LLaVA-NeXT's
(`select_best_resolution`, `resize_and_pad_image` and `process_anyres_image` in llava/mm_utils.py,
and LlavaNextImageProcessor in transformers). LLaVA-1.5-HD has every grid of at most 6 tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..config import TilingConfig
from . import preprocess
from .dynamic import grids
from .picture import Cut

Size = tuple[int, int]


def cut(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> the whole, stretched, and then its tiles row after row: uint8
    [image_size, image_size, 3] each; and the grid (rows, columns)."""
    side, resample = tiling.image_size, tiling.resample
    views = [preprocess.squash(image, side, resample)]
    grid = choose_grid(image.size, tiling, max_tiles)
    if grid is None:
        return views, (1, 1)
    columns, rows = grid
    canvas = np.empty((rows * side, columns * side, 3), np.uint8)
    canvas[:] = tiling.background
    width, height = resized(image.size, (columns * side, rows * side))
    left, top = (columns * side - width) // 2, (rows * side - height) // 2
    inner = preprocess.stretch(image, width, height, resample)
    canvas[top : top + height, left : left + width] = inner
    return [*views, *preprocess.tiles(canvas, side)], (rows, columns)


def plan(size: Size, tiling: TilingConfig, max_tiles: int | None) -> Cut:
    """How a picture of (width, height) is cut, the view of the whole among its views."""
    return Cut.into(choose_grid(size, tiling, max_tiles), size)


def choose_grid(
    size: Size, tiling: TilingConfig, max_tiles: int | None = None
) -> tuple[int, int] | None:
    """(columns, rows) for a picture of (width, height); None where `max_tiles` allows no grid."""
    most = tiling.max_tiles if max_tiles is None else min(max_tiles, tiling.max_tiles)
    allowed: Sequence[tuple[int, int]] = tiling.grids or grids(tiling.min_tiles, tiling.max_tiles)
    width, height = size
    side = tiling.image_size
    best, most_kept, least_waste = None, 0, math.inf
    for columns, rows in allowed:
        if columns * rows > most:
            continue
        scale = min(columns * side / width, rows * side / height)
        # What an enlargement adds is no detail.
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * rows * side**2 - kept
        if kept > most_kept or (kept == most_kept and waste < least_waste):
            best, most_kept, least_waste = (columns, rows), kept, waste
    return best


def resized(size: Size, canvas: Size) -> Size:
    """(width, height) of a picture made as large as fits on a canvas of (width, height)."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]
