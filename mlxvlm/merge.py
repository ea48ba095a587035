"""From the views of pictures to one sequence of visual tokens, between projector and prompt.

    flat            every view's tokens, one view after the other
    spatial_unpad   the whole's tokens, then the tiles' as one map: what lies in the canvas' padding
                    is left out, and each row ends with `image_newline` (LLaVA-NeXT)

    whole  tile 1  tile 2        a b   A B | E F          a b c d  A B E F \\n  C D G H \\n
                                 c d   C D | G H    ->

A merge says which token stands where, as numbers of rows of the views' tokens, and knows nothing
but how each picture was cut: tokens are counted, and places made for them, before any picture is
opened. A new merge is a row in MERGES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .config import ModelConfig
from .errors import PromptError
from .images.picture import Cut
from .prompts.marks import Shown, marks

# In an order: not a view's token, but `image_newline`.
NEWLINE = -1


class Merge(NamedTuple):
    """order: (cut, tokens a view) -> int32 [visual tokens], each a row of [views * tokens] or
    NEWLINE. count: how many they are."""

    order: Callable[[Cut, int], np.ndarray]
    count: Callable[[Cut, int], int]


def visual_tokens(config: ModelConfig, cut: Cut) -> int:
    """Visual tokens that the language model sees for a picture."""
    return MERGES[config.prompt.merge].count(cut, config.tokens_per_view)


def shown(config: ModelConfig, cuts: Sequence[Cut]) -> list[Shown]:
    """What stands in a prompt for each of its pictures: visual tokens, and marks between them."""
    style = config.prompt.view_marks
    if style == "none":
        return [visual_tokens(config, cut) for cut in cuts]
    each = config.tokens_per_view
    return [[(mark, each) for mark in marks(style, cut, number)] for number, cut in enumerate(cuts)]


def unbroken(config: ModelConfig, cut: Cut) -> list[int]:
    """Lengths of the runs of a picture's visual tokens that no other token may part."""
    if config.prompt.merge == "flat":
        return [config.tokens_per_view] * cut.views
    return [visual_tokens(config, cut)]


def merge_tokens(
    config: ModelConfig, tokens: mx.array, newline: mx.array | None, cuts: Sequence[Cut]
) -> mx.array:
    """[visual tokens, D] of the projected [views * tokens, D] of pictures cut so, in order."""
    if config.prompt.merge == "flat":
        return tokens
    assert newline is not None  # a model that merges so is built with one
    order, each = MERGES[config.prompt.merge].order, config.tokens_per_view
    starts = np.cumsum([0] + [cut.views * each for cut in cuts])
    if starts[-1] != len(tokens):
        raise PromptError(
            f"{len(tokens)} tokens of views came for pictures that are cut into "
            f"{starts[-1] // each} views of {each}."
        )
    orders = [order(cut, each) for cut in cuts]
    rows = np.concatenate(
        [np.where(o < 0, NEWLINE, o + s) for o, s in zip(orders, starts, strict=False)]
    )
    # A row's end looks up row 0 unused, so that its gradient is a sum and not a scatter.
    found = tokens[mx.array(np.maximum(rows, 0).astype(np.int32))]
    ends = mx.array(rows == NEWLINE)[:, None]
    return mx.where(ends, newline, found)


def _flat(cut: Cut, tokens: int) -> np.ndarray:
    return np.arange(cut.views * tokens, dtype=np.int32)


def _count_flat(cut: Cut, tokens: int) -> int:
    return cut.views * tokens


@lru_cache(1024)
def _spatial_unpad(cut: Cut, tokens: int) -> np.ndarray:
    whole = np.arange(tokens, dtype=np.int32)
    if cut.views == 1:
        return np.append(whole, np.int32(NEWLINE))
    rows, columns = cut.grid
    side = isqrt(tokens)
    tiles = np.arange(tokens, cut.views * tokens, dtype=np.int32)
    # [rows, columns, side, side] -> [rows * side, columns * side]
    canvas = tiles.reshape(rows, columns, side, side).swapaxes(1, 2)
    canvas = canvas.reshape(rows * side, columns * side)
    top, left = _padding(cut, side)
    canvas = canvas[top : len(canvas) - top, left : canvas.shape[1] - left]
    lines = np.pad(canvas, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([whole, lines.ravel()])


def _count_spatial_unpad(cut: Cut, tokens: int) -> int:
    if cut.views == 1:
        return tokens + 1
    rows, columns = cut.grid
    side = isqrt(tokens)
    top, left = _padding(cut, side)
    return tokens + (rows * side - 2 * top) * (columns * side - 2 * left + 1)


def _padding(cut: Cut, side: int) -> tuple[int, int]:
    """Rows of tokens above and below the picture, and columns to its left and right: `unpad_image`
    in llava_arch.py, with the rounding of transformers."""
    if cut.size is None or cut.grid[0] * cut.grid[1] != cut.views - 1:
        raise PromptError(
            "prompt.merge 'spatial_unpad' needs to know a picture's size and grid, with a view of "
            f"the whole and one of each tile, but this one is {cut}."
        )
    (width, height), down, across = cut.size, cut.grid[0] * side, cut.grid[1] * side
    if width / height > across / down:
        return (down - int(round(height * (across / width), 7))) // 2, 0
    return 0, (across - int(round(width * (down / height), 7))) // 2


MERGES: dict[str, Merge] = {
    "flat": Merge(_flat, _count_flat),
    "spatial_unpad": Merge(_spatial_unpad, _count_spatial_unpad),
}
