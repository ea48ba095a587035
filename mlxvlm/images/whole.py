"""EVE's pictures: one view in the picture's own shape, its sides whole numbers of cells.

    640 x 480, image_size 672, 24 cells of 28 pixels:  672 x 504, 24 x 18 cells
    1920 x 1080                                        672 x 392, 24 x 14

The long side becomes image_size, the short one the next whole cell up, so a picture is stretched a
little. Its grid is counted in what the patch embedding layer gives: squares of 2 x 2 patches. For
the teacher of such a model, the view lies in the middle of a square canvas, on whole cells, as
EVE's `process_images` has it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..config import TilingConfig
from . import preprocess
from .picture import Cut

# Patches along a side that become one token.
STRIDE = 2


def cells_of(size: tuple[int, int], tiling: TilingConfig) -> tuple[int, int]:
    """(columns, rows) of cells that a picture of (width, height) has."""
    longest = max(size)
    columns, rows = (max(1, -(-tiling.cells * side // longest)) for side in size)
    return columns, rows


def cut(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> one view, uint8 [height, width, 3], and its grid (rows, columns) of tokens."""
    found = plan(image.size, tiling, max_tiles)
    (size,) = view_sizes(found, tiling)
    return [preprocess.stretch(image, *size, tiling.resample)], found.grid


def plan(size: tuple[int, int], tiling: TilingConfig, max_tiles: int | None) -> Cut:
    """How a picture of (width, height) is cut."""
    columns, rows = cells_of(size, tiling)
    each = tiling.image_size // tiling.cells // (STRIDE * tiling.patch_size)
    return Cut(1, (rows * each, columns * each), size)


def view_sizes(cut: Cut, tiling: TilingConfig) -> list[tuple[int, int]]:
    """(width, height) of the view."""
    rows, columns = cut.grid
    pixels = STRIDE * tiling.patch_size
    return [(columns * pixels, rows * pixels)]


def centred(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> the same view on a square canvas of `background`, uint8 [image_size, image_size,
    3]."""
    columns, rows = cells_of(image.size, tiling)
    cell = tiling.image_size // tiling.cells
    left, top = (offset(n, tiling.cells) * cell for n in (columns, rows))
    canvas = np.full((tiling.image_size, tiling.image_size, 3), tiling.background, np.uint8)
    inside = preprocess.stretch(image, columns * cell, rows * cell, tiling.resample)
    canvas[top : top + rows * cell, left : left + columns * cell] = inside
    return [canvas], (1, 1)


def offset(cells: int, whole: int) -> int:
    """Cells of canvas before so many in the middle of `whole`."""
    return (whole - cells) // 2
