"""From a picture to the views that the encoder sees.

A tiling is two functions: of the picture, its config and the most tiles allowed to the views and
the grid (rows, columns) that they came from; and of the picture's size alone to how it will be cut.
A new tiling is a row in TILINGS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..config import TilingConfig
from ..errors import ConfigError
from . import anyres, cover, dynamic, preprocess, slices, whole
from .colour import to_rgb
from .open import MAX_PIXELS, Source, open_picture, upright_size
from .picture import Cut, Picture

Size = tuple[int, int]
Views = tuple[list[np.ndarray], tuple[int, int]]


class Tiling(NamedTuple):
    """cut: (image, config, most tiles) -> (views, grid). plan: ((width, height), config, most
    tiles) -> how `cut` cuts a picture of that size."""

    cut: Callable[[Image.Image, TilingConfig, int | None], Views]
    plan: Callable[[Size, TilingConfig, int | None], Cut]


def tile(image: Image.Image, tiling: TilingConfig, max_tiles: int | None = None) -> Picture:
    """Views of an upright image, each uint8 [H, W, 3].

    max_tiles: at most so many tiles, for tilings that make several; None is the tiling's own limit.
    """
    _check_limit(max_tiles)
    if image.mode != "RGB":
        image = to_rgb(image)
    views, grid = TILINGS[tiling.type].cut(image, tiling, max_tiles)
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


def plan_cut(
    source: Source, tiling: TilingConfig, max_tiles: int | None = None, max_pixels: int = MAX_PIXELS
) -> Cut:
    """How `look` cuts a picture, from its header where that tells its size."""
    _check_limit(max_tiles)
    return TILINGS[tiling.type].plan(upright_size(source, max_pixels), tiling, max_tiles)


def tiles_each(tiling: TilingConfig, among: int, most: int = 0) -> int | None:
    """The most tiles that each of `among` pictures in one row of data may have; None: as many as
    the tiling makes.

    A single view is never limited, and any-resolution tiles and slices only by `most`: LLaVA-NeXT
    and MiniCPM-V give each picture its own; MM1.5 does too, but splits none where there are three
    or more ("cover": one view each). Dynamic tiles are InternVL's: a picture alone has max_tiles,
    each of several max_tiles // among, at least one, and thumbnails are not counted (`dataset.py`
    of internvl_chat, multi_modal_multi_image_get_item). most: less than max_tiles, as a source of
    rows may ask; 0 for no such wish.
    """
    if tiling.type in ("single", "whole", "centred"):
        return None
    if tiling.type == "cover" and among >= cover.SPLIT_UNDER:
        return 1
    budget = min(most or tiling.max_tiles, tiling.max_tiles)
    if among < 2 or tiling.type != "dynamic":
        return budget if budget < tiling.max_tiles else None
    return max(1, budget // among)


def view(image: Image.Image, tiling: TilingConfig) -> np.ndarray:
    """RGB image -> one square view, uint8 [image_size, image_size, 3]."""
    size, resample = tiling.image_size, tiling.resample
    if tiling.resize == "squash":
        return preprocess.squash(image, size, resample)
    if tiling.resize == "crop":
        return preprocess.crop(image, size, resample)
    return preprocess.pad(image, size, resample, tiling.background)


def single(image: Image.Image, tiling: TilingConfig, max_tiles: int | None) -> Views:
    """The whole picture as one view, which any max_tiles allows."""
    return [view(image, tiling)], (1, 1)


def view_sizes(cut: Cut, tiling: TilingConfig) -> list[Size]:
    """(width, height) of each view of a picture that is cut so."""
    if tiling.type == "whole":
        return whole.view_sizes(cut, tiling)
    if tiling.type == "slices":
        return slices.view_sizes(cut, tiling)
    return [(tiling.image_size, tiling.image_size)] * cut.views


def _check_limit(max_tiles: int | None) -> None:
    if max_tiles is not None and max_tiles < 1:
        raise ConfigError(f"max_tiles (={max_tiles}) must be at least 1.")


TILINGS: dict[str, Tiling] = {
    "single": Tiling(single, lambda size, tiling, max_tiles: Cut(1)),
    "dynamic": Tiling(dynamic.cut, dynamic.plan),
    "anyres": Tiling(anyres.cut, anyres.plan),
    "cover": Tiling(cover.cut, cover.plan),
    "slices": Tiling(slices.cut, slices.plan),
    "whole": Tiling(whole.cut, whole.plan),
    "centred": Tiling(whole.centred, lambda size, tiling, max_tiles: Cut(1)),
}
