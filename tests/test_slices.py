"""MiniCPM-V's slices: which grid, which sizes, and that the views are all of the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import tiny_config

from mlxvlm.config import TilingConfig
from mlxvlm.errors import ConfigError
from mlxvlm.images.picture import Cut
from mlxvlm.images.slices import best_size, choose_grid, slice_size, view_sizes
from mlxvlm.images.tiling import plan_cut, tile, tiles_each

MINICPM = TilingConfig("slices", 448, max_tiles=9)

# Of a picture (width, height): overview, grid (columns, rows), resized, one slice, views.
TABLE = {
    (448, 448): ((448, 448), None, None, None, 1),
    (300, 200): ((546, 364), None, None, None, 1),
    (640, 480): ((518, 392), (2, 1), (728, 546), (364, 546), 3),
    (800, 600): ((518, 392), (2, 2), (1036, 784), (518, 392), 5),
    (1000, 300): ((812, 252), (3, 1), (1428, 420), (476, 420), 4),
    (1344, 1344): ((448, 448), (3, 3), (1344, 1344), (448, 448), 10),
    (1920, 1080): ((602, 336), (4, 2), (1680, 952), (420, 476), 9),
    (1080, 1920): ((336, 602), (2, 4), (952, 1680), (476, 420), 9),
    (2000, 500): ((896, 224), (4, 1), (1792, 448), (448, 448), 5),
    (449, 448): ((448, 448), (2, 1), (644, 630), (322, 630), 3),
}
# LLM tokens of each, 96 a view.
TOKENS = (96, 96, 288, 480, 384, 960, 864, 864, 480, 288)


UHD = TilingConfig("slices", 336, max_tiles=7, rounding="down")
# LLaVA-UHD's, where known: overview, grid, one slice.
UHD_TABLE = {
    (336, 336): ((336, 336), None, None),
    (300, 200): ((406, 266), None, None),
    (640, 480): ((378, 280), (2, 2), (378, 280)),
    (672, 1088): ((252, 420), (2, 3), (322, 336)),
    (1088, 672): (None, (3, 2), None),
    (1000, 300): (None, (3, 1), (350, 308)),
    (1920, 1080): (None, (3, 2), (364, 308)),
}


@pytest.mark.parametrize("size", UHD_TABLE)
def test_llava_uhd_has_these_slices(size):
    overview, grid, one = UHD_TABLE[size]
    assert choose_grid(size, UHD) == grid
    found = view_sizes(tile(Image.new("RGB", size), UHD).cut, UHD)
    assert overview in (None, found[0])
    assert len(found) == (1 if grid is None else 1 + grid[0] * grid[1])
    assert one in (None, found[-1])


@pytest.mark.parametrize("size", TABLE)
def test_minicpm_has_these_slices(size):
    overview, grid, whole, one, views = TABLE[size]
    assert choose_grid(size, MINICPM) == grid
    assert best_size(size, MINICPM, enlarge=grid is None) == overview
    if grid is not None:
        across, down = slice_size(size, grid, MINICPM)
        assert (across, down) == one and (across * grid[0], down * grid[1]) == whole
    found = tile(Image.new("RGB", size), MINICPM)
    assert found.cut == plan_cut(Image.new("RGB", size), MINICPM)
    assert len(found.views) == views == dict(zip(TABLE, TOKENS, strict=True))[size] // 96
    assert [view.shape[1::-1] for view in found.views] == [overview, *[one] * (views - 1)]


sides = st.one_of(st.integers(1, 3000), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(
    sides,
    sides,
    st.integers(1, 12),
    st.none() | st.integers(1, 12),
    st.sampled_from(["nearest", "down"]),
)
@example(1, 1, 9, None, "nearest")
@example(20000, 20, 9, None, "nearest")
@example(20000, 20, 7, None, "down")
@example(20, 20000, 9, None, "nearest")
@example(20000, 20, 9, 1, "nearest")
@example(2999, 3000, 2, None, "down")
def test_slices_are_all_of_the_picture_and_within_limits(width, height, most, row, rounding):
    tiling = TilingConfig("slices", 32, max_tiles=most, patch_size=4, rounding=rounding)
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    found = tile(image, tiling, row)
    assert found.cut == plan_cut(image, tiling, row)
    for view in found.views:
        assert view.dtype == np.uint8 and all(side and side % 4 == 0 for side in view.shape[:2])
    assert [view.shape[1::-1] for view in found.views] == view_sizes(found.cut, tiling)
    rows, columns = found.grid
    if len(found.views) == 1:
        assert found.grid == (1, 1) and (width * height <= 32**2 or min(most, row or most) == 1)
        return
    limit = min(most, row or most)
    assert 2 <= rows * columns == len(found.views) - 1 <= limit
    assert rows * columns <= math.ceil(width * height / 32**2) + 1
    slices = iter(found.views[1:])
    lines = [np.hstack([next(slices) for _ in range(columns)]) for _ in range(rows)]
    canvas = np.vstack(lines)
    size = canvas.shape[1::-1]
    assert (canvas == np.array(image.resize(size, Image.Resampling.BICUBIC))).all()


def test_each_picture_of_a_row_has_its_own_slices():
    assert [tiles_each(MINICPM, among) for among in (1, 2, 9)] == [None] * 3
    assert choose_grid((1920, 1080), MINICPM, 4) == (3, 1)
    assert plan_cut(Image.new("RGB", (1920, 1080)), MINICPM, 1) == Cut(1, (1, 1), (1920, 1080))


def test_an_encoder_with_a_fixed_grid_cannot_take_them():
    with pytest.raises(ConfigError, match="many shapes"):
        tiny_config(tiling=TilingConfig("slices", 32))
