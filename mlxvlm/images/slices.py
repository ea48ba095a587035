"""MiniCPM-V's slices: an overview, and a grid of slices, each of about image_size² pixels.

    640 x 480, of about 448²           +-----+-----+
    0 = overview of 518 x 392          |  1  |  2  |     each 364 x 546: no view is a square, and
                                       +-----+-----+     the tower takes them as they are

A picture of no more than image_size² pixels is its overview alone, enlarged. Otherwise it is cut
into ceil(pixels / image_size²) slices, one fewer or one more, at most max_tiles: the grid whose
columns / rows is nearest, as a logarithm, to width / height, and of equals the first. Sides are
multiples of patch_size. Rule and roundings are those of MiniCPM-Llama3-V 2.5 (`slice_image` in
OpenBMB/MiniCPM-V's finetune/dataset.py), after LLaVA-UHD (Xu et al. 2024), which rounds down.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ..config import TilingConfig
from ..errors import PictureError
from . import preprocess
from .picture import Cut

Size = tuple[int, int]


def cut(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """RGB image -> the overview, and then its slices row after row: uint8 [height, width, 3], all
    slices alike; and the grid (rows, columns)."""
    grid = choose_grid(image.size, tiling, max_tiles)
    width, height = best_size(image.size, tiling, enlarge=grid is None)
    views = [preprocess.stretch(image, width, height, tiling.resample)]
    if grid is None:
        return views, (1, 1)
    columns, rows = grid
    across, down = slice_size(image.size, grid, tiling)
    canvas = preprocess.stretch(image, across * columns, down * rows, tiling.resample)
    for y in range(0, down * rows, down):
        views += [canvas[y : y + down, x : x + across] for x in range(0, across * columns, across)]
    return views, (rows, columns)


def plan(size: Size, tiling: TilingConfig, max_tiles: int | None) -> Cut:
    """How a picture of (width, height) is cut, the overview among its views."""
    return Cut.into(choose_grid(size, tiling, max_tiles), size)


def choose_grid(
    size: Size, tiling: TilingConfig, max_tiles: int | None = None
) -> tuple[int, int] | None:
    """(columns, rows) for a picture of (width, height); None where it is not sliced."""
    most = tiling.max_tiles if max_tiles is None else min(max_tiles, tiling.max_tiles)
    width, height = size
    wanted = min(math.ceil(width * height / tiling.image_size**2), most)
    if wanted <= 1:
        return None
    best, least = None, math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            off = abs(math.log(width / height) - math.log(columns / (count // columns)))
            if off < least:
                best, least = (columns, count // columns), off
    return best


def best_size(size: Size, tiling: TilingConfig, enlarge: bool) -> Size:
    """(width, height) of about image_size² pixels and the same shape, in whole patches; a smaller
    picture keeps its own, unless it is to be enlarged."""
    width, height = size
    if enlarge or width * height > tiling.image_size**2:
        shape = width / height
        height = int(tiling.image_size / math.sqrt(shape))
        width = int(height * shape)
    return _patches(width, tiling), _patches(height, tiling)


def slice_size(size: Size, grid: tuple[int, int], tiling: TilingConfig) -> Size:
    """(width, height) of each slice of a picture of (width, height) under (columns, rows)."""
    # Whole pixels a slice first.
    across, down = (_whole(side / n, tiling) for side, n in zip(size, grid, strict=True))
    return best_size((across, down), tiling, enlarge=True)


def view_sizes(cut: Cut, tiling: TilingConfig) -> list[Size]:
    """(width, height) of each view of a picture that is cut so."""
    rows, columns = cut.grid
    if cut.size is None or cut.views not in (1, 1 + rows * columns):
        raise PictureError(
            "views of many shapes are told apart by the picture's size and grid, with an overview "
            f"and one view of each slice, but this one is {cut}."
        )
    overview = best_size(cut.size, tiling, enlarge=cut.views == 1)
    if cut.views == 1:
        return [overview]
    return [overview, *[slice_size(cut.size, (columns, rows), tiling)] * (rows * columns)]


def _patches(side: int, tiling: TilingConfig) -> int:
    return _whole(side / tiling.patch_size, tiling) * tiling.patch_size


def _whole(number: float, tiling: TilingConfig) -> int:
    """A whole number from 1 up; Python's round, halves to even, as there."""
    return max(math.floor(number) if tiling.rounding == "down" else round(number), 1)
