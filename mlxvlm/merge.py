"""From the views of pictures to one sequence of visual tokens, between projector and prompt.

    flat            every view's tokens, one view after the other
    spatial_unpad   the whole's tokens, then the tiles' as one map: what lies in the canvas' padding
                    is left out, and each row ends with `image_newline` (LLaVA-NeXT)
    minicpm         the overview, then the slices, with words of the vocabulary around each
    uhd             the slices, with words of the vocabulary between them, then the overview
    separators      every view's tokens, tiles and then the whole, and words between them (MM1.5)
    index           the same, each view behind its place in words
    rows            a class token, then rows of tokens, each with its end: a view's tokens as they
                    come, whose number hangs on the picture's shape (EVE)

    whole  tile 1  tile 2        a b   A B | E F          a b c d  A B E F \\n  C D G H \\n
                                 c d   C D | G H    ->

    overview, 2 x 2 slices       o   A B     <image>o</image><slice><image>A</image><image>B</image>
                                     C D  ->      \\n<image>C</image><image>D</image></slice>
                                          ->  A,B\\nC,D\\no

    tiles, the whole             A B     w    A,B\\nC,D:w
                                 C D      ->  (0,1,1)A(0,1,2)B(0,2,1)C(0,2,2)D(0,0,0)w

A merge says which token stands where, as numbers of rows of the views' tokens, and which words
stand between them. It knows nothing but how each picture was cut: tokens are counted, and places
made for them, before any picture is opened. A new merge is a row in MERGES.
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
from .prompts.pieces import Spelling

# In an order: not a view's token, but `image_newline`.
NEWLINE = -1


class Merge(NamedTuple):
    """order: (cut, tokens a view) -> int32 [visual tokens], each a row of [views * tokens] or
    NEWLINE. count: how many they are. spell: how they stand in a prompt, for the cut, the tokens a
    view and the picture's number there; None is all together."""

    order: Callable[[Cut, int], np.ndarray]
    count: Callable[[Cut, int], int]
    spell: Callable[[Cut, int, int], Spelling] | None = None


def visual_tokens(config: ModelConfig, cut: Cut) -> int:
    """Visual tokens that the language model sees for a picture."""
    return MERGES[config.prompt.merge].count(cut, config.tokens_per_view)


def spelling(config: ModelConfig, cut: Cut, number: int = 0) -> Spelling:
    """How a picture stands in a prompt: runs of visual tokens, and words between them. number:
    which of the prompt's pictures it is, from 0."""
    spell = MERGES[config.prompt.merge].spell
    if spell is None:
        return (visual_tokens(config, cut),)
    return spell(cut, config.tokens_per_view, number)


def unbroken(config: ModelConfig, cut: Cut) -> list[int]:
    """Lengths of the runs of a picture's visual tokens that no other token may part."""
    if config.prompt.merge not in ("spatial_unpad", "rows"):
        return [config.tokens_per_view] * cut.views
    return [visual_tokens(config, cut)]


def merge_tokens(
    config: ModelConfig, tokens: mx.array, newline: mx.array | None, cuts: Sequence[Cut]
) -> mx.array:
    """[visual tokens, D] of the projected [views * tokens, D] of pictures cut so, in order."""
    if config.prompt.merge in IN_ORDER:
        return tokens
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
    if newline is None:
        return tokens[mx.array(rows.astype(np.int32))]
    # A row's end looks up row 0 unused, so that its gradient is a sum and not a scatter.
    found = tokens[mx.array(np.maximum(rows, 0).astype(np.int32))]
    ends = mx.array(rows == NEWLINE)[:, None]
    return mx.where(ends, newline, found)


@lru_cache(1024)
def _spell_minicpm(cut: Cut, tokens: int, number: int) -> Spelling:
    """MiniCPM-V's: `get_slice_image_placeholder` in its finetune/dataset.py."""
    view = ("<image>", tokens, "</image>")
    if cut.views == 1:
        return view
    rows, columns = _slices(cut)
    lines = ("\n", *view * columns) * rows
    return (*view, "<slice>", *lines[1:], "</slice>")


@lru_cache(1024)
def _spell_uhd(cut: Cut, tokens: int, number: int) -> Spelling:
    """LLaVA-UHD's "spatial schema" (Xu et al. 2024, section 3.3)."""
    if cut.views == 1:
        return (tokens,)
    rows, columns = _slices(cut)
    line = (*(tokens, ",") * (columns - 1), tokens, "\n")
    return (*line * rows, tokens)


@lru_cache(1024)
def _spell_separators(cut: Cut, tokens: int, number: int) -> Spelling:
    """MM1.5's second kind of sub-image position indicators (McKinzie et al. 2024); its row
    separator is a token of its own, here it is a newline, which every vocabulary has."""
    rows, columns = cut.grid
    line = (*(tokens, ",") * (columns - 1), tokens, "\n")
    tiles = (line * rows)[:-1]
    return (*tiles, ":", tokens) if cut.views > rows * columns else tiles


@lru_cache(1024)
def _spell_index(cut: Cut, tokens: int, number: int) -> Spelling:
    """Its first kind: (picture from 0, row, column from 1), and row and column 0 of the whole."""
    rows, columns = cut.grid
    places = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
    places = [(0, 0)] if cut.views == 1 else [*places, (0, 0)][: cut.views]
    each = ((f"({number},{row},{column})", tokens) for row, column in places)
    return tuple(part for pair in each for part in pair)


@lru_cache(1024)
def _uhd(cut: Cut, tokens: int) -> np.ndarray:
    return np.roll(np.arange(cut.views * tokens, dtype=np.int32), -tokens)


def _slices(cut: Cut) -> tuple[int, int]:
    rows, columns = cut.grid
    if rows * columns != cut.views - 1:
        raise PromptError(
            "a picture of slices has a view of the whole and one of each slice, but this one is "
            f"{cut}."
        )
    return rows, columns


def _flat(cut: Cut, tokens: int) -> np.ndarray:
    return np.arange(cut.views * tokens, dtype=np.int32)


def _count_flat(cut: Cut, tokens: int) -> int:
    return cut.views * tokens


def _rows(cut: Cut, tokens: int) -> np.ndarray:
    return np.arange(_count_rows(cut, tokens), dtype=np.int32)


def _count_rows(cut: Cut, tokens: int) -> int:
    rows, columns = cut.grid
    return 1 + rows * (columns + 1)


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
    "minicpm": Merge(_flat, _count_flat, _spell_minicpm),
    "uhd": Merge(_uhd, _count_flat, _spell_uhd),
    "separators": Merge(_flat, _count_flat, _spell_separators),
    "index": Merge(_flat, _count_flat, _spell_index),
    "rows": Merge(_rows, _count_rows),
}
# Merges whose visual tokens stand as the views do.
IN_ORDER = ("flat", "minicpm", "separators", "index", "rows")
