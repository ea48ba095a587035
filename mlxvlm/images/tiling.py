"""From a picture to the views that the encoder sees.

A tiling is one function of the picture, its config and the most tiles allowed; it returns the
views and the grid (rows, columns) that they came from. A new tiling is a new function and a row in
TILINGS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from ..config import TilingConfig
from ..errors import ConfigError
from . import preprocess
from .colour import to_rgb
from .open import MAX_PIXELS, Source, open_picture
from .picture import Picture

Tiling = Callable[[Image.Image, TilingConfig, int | None], tuple[list[np.ndarray], tuple[int, int]]]


def tile(image: Image.Image, tiling: TilingConfig, max_tiles: int | None = None) -> Picture:
    """Views of an upright image, each uint8 [H, W, 3].

    max_tiles: at most so many tiles, for tilings that make several; None is the tiling's own limit.
    """
    if max_tiles is not None and max_tiles < 1:
        raise ConfigError(f"max_tiles (={max_tiles}) must be at least 1.")
    if image.mode != "RGB":
        image = to_rgb(image)
    views, grid = TILINGS[tiling.type](image, tiling, max_tiles)
    return Picture(views=views, grid=grid, size=image.size)


def look(
    source: Source,
    tiling: TilingConfig,
    max_tiles: int | None = None,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Opens, orients and tiles a picture; see `open_picture` for what `source` may be."""
    image, sha256 = open_picture(source, allow_urls=allow_urls, max_pixels=max_pixels)
    picture = tile(image, tiling, max_tiles)
    picture.sha256 = sha256
    return picture


def tiles_each(tiling: TilingConfig, among: int) -> int | None:
    """The most tiles that each of `among` pictures in one row of data may have; None: as many as
    the tiling makes. A single view is never limited."""
    return None


def view(image: Image.Image, tiling: TilingConfig) -> np.ndarray:
    """RGB image -> one square view, uint8 [image_size, image_size, 3]."""
    size, resample = tiling.image_size, tiling.resample
    if tiling.resize == "squash":
        return preprocess.squash(image, size, resample)
    if tiling.resize == "crop":
        return preprocess.crop(image, size, resample)
    return preprocess.pad(image, size, resample, tiling.background)


def single(
    image: Image.Image, tiling: TilingConfig, max_tiles: int | None
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """The whole picture as one view, which any max_tiles allows."""
    return [view(image, tiling)], (1, 1)


TILINGS: dict[str, Tiling] = {"single": single}
