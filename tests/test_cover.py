"""MM1.5's tiles: which grid covers a picture, that nothing of it is lost, and how a row decides."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_mm15 import mm15_config
from tiny_vlm import tiny_config

from mlxvlm.config import TILINGS, ModelConfig, PromptConfig, TilingConfig
from mlxvlm.errors import ConfigError
from mlxvlm.images.cover import choose_grid, resized
from mlxvlm.images.picture import Cut
from mlxvlm.images.tiling import plan_cut, tile, tiles_each
from mlxvlm.merge import spelling
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder

# (width, height) of tiles of 672 pixels, 4 to 9 of them: (columns, rows), the picture on them.
GRIDS = {
    (1344, 1344): ((2, 2), (1344, 1344)),
    (2016, 2016): ((3, 3), (2016, 2016)),
    (2688, 672): ((4, 1), (2688, 672)),
    (672, 2688): ((1, 4), (672, 2688)),
    (4000, 4000): ((3, 3), (2016, 2016)),  # nothing covers it
    (4000, 1000): ((4, 1), (2688, 672)),  # nor this: 4 x 1 keeps as much as any
    (1000, 600): ((3, 2), (2016, 1210)),
    (640, 480): ((3, 2), (1792, 1344)),
    (1920, 1080): ((4, 2), (2389, 1344)),
    (3000, 2000): ((3, 2), (2016, 1344)),
    (672, 672): ((2, 2), (1344, 1344)),
    (1, 1): ((2, 2), (1344, 1344)),
    (20000, 20): ((9, 1), (6048, 6)),
    (20, 20000): ((1, 9), (6, 6048)),
}


def tiling(name: str = "cover", side: int = 672, **fields: object) -> TilingConfig:
    return TilingConfig(image_size=side, **{**TILINGS[name], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", GRIDS)
def test_grids_of_the_worked_examples(size):
    grid, inner = GRIDS[size]
    assert choose_grid(size, tiling()) == grid
    assert resized(size, grid, 672) == inner
    tiles = grid[0] * grid[1]
    assert plan_cut(Image.new("L", size), tiling()) == Cut(tiles + 1, grid[::-1], size)
    static = plan_cut(Image.new("L", size), tiling("cover-2x2"))
    assert static == Cut(5, (2, 2), size)


def test_nine_tiles_of_672_are_four_megapixels():
    assert 9 * 672**2 == 4_064_256
    assert tiling().max_tiles == 9 and tiling().min_tiles == 4


def test_a_tie_goes_to_fewer_tiles():
    # A square fills 2 x 2 and 3 x 3 alike; no grid covers this strip, and 5 x 1 keeps all of it.
    assert choose_grid((600, 600), tiling()) == (2, 2)
    assert choose_grid((50_000, 10_000), tiling()) == (5, 1)


def test_a_row_with_three_pictures_splits_none():
    for name in ("cover", "cover-2x2"):
        one = tiling(name)
        assert [tiles_each(one, among) for among in (1, 2, 3, 4, 40)] == [None, None, 1, 1, 1]
        assert [tiles_each(one, among, 6) for among in (1, 2, 3)] == (
            [6, 6, 1] if name == "cover" else [None, None, 1]
        )
        assert plan_cut(Image.new("L", (2000, 900)), one, 1) == Cut(1, (1, 1), (2000, 900))
    assert choose_grid((2000, 900), tiling(), 5) == (4, 1)


sides = st.one_of(st.integers(1, 3000), st.integers(1, 24))


@settings(max_examples=50, deadline=None)
@given(
    sides,
    sides,
    st.sampled_from([("cover", {}), ("cover-2x2", {}), ("cover", {"min_tiles": 1})]),
    st.booleans(),
    st.sampled_from([None, None, 1]),
)
@example(1, 1, ("cover", {}), True, None)
@example(20000, 20, ("cover", {}), True, None)
@example(20000, 20, ("cover-2x2", {}), True, None)
@example(20, 20000, ("cover-2x2", {}), False, None)
@example(20000, 1, ("cover-2x2", {}), True, 1)
def test_tiles_hold_the_whole_picture_and_none_is_empty(width, height, kind, whole, limit):
    name, fields = kind
    one = tiling(name, 8, use_thumbnail=whole, background=(0, 0, 0), **fields)
    white = Image.new("RGB", (width, height), (255, 255, 255))
    found = tile(white, one, limit)
    rows, columns = found.grid
    assert found.cut == plan_cut(white, one, limit)
    assert all(v.shape == (8, 8, 3) and v.dtype == np.uint8 for v in found.views)
    if limit == 1 and name == "cover-2x2" or rows * columns == 1:
        assert len(found.views) == 1 and found.grid == (1, 1)
        assert found.views[0].any()
        return
    assert len(found.views) == rows * columns + whole
    assert one.min_tiles <= rows * columns <= one.max_tiles
    assert all(view.any() for view in found.views[: rows * columns])
    together = [np.hstack(found.views[row * columns : (row + 1) * columns]) for row in range(rows)]
    canvas = np.vstack(together)[..., 0] > 0
    ys, xs = np.where(canvas.any(1))[0], np.where(canvas.any(0))[0]
    # All of it, once, in the middle; nothing else on the canvas.
    assert (xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1) == resized((width, height), (columns, rows), 8)
    assert canvas[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].all()
    assert (
        abs(ys[0] - (8 * rows - 1 - ys[-1])) <= 1 and abs(xs[0] - (8 * columns - 1 - xs[-1])) <= 1
    )


def test_what_is_seen_is_the_picture_enlarged():
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    found = tile(image, tiling("cover-2x2", 8))
    views, pixels = found.views, np.array(image)
    for view, (row, column) in zip(views, product(range(2), range(2)), strict=False):
        assert (view == pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]).all()
    assert (views[4] == np.array(image.resize((8, 8), Image.Resampling.BICUBIC))).all()


def test_an_encoder_is_known_by_what_its_views_depend_on():
    config = tiny_config().vision
    vision = build_vision(config)

    def identity(**fields: object) -> dict[str, object]:
        return Encoder(vision, config, tiling("cover", 32, **fields)).identity()

    usual = identity()
    for name, value in (("max_tiles", 8), ("background", (0, 0, 0)), ("use_thumbnail", False)):
        other = identity(**{name: value})
        assert {k for k in other if other[k] != usual[k]} == {f"tiling.{name}"}


def test_words_between_views():
    four, six, alone = Cut(5, (2, 2)), Cut(6, (2, 3)), Cut(1)

    def laid(merge: str, cut: Cut, number: int = 0) -> tuple[int | str, ...]:
        return spelling(mm15_config(merge=merge), cut, number)

    assert laid("separators", four) == (4, ",", 4, "\n", 4, ",", 4, ":", 4)
    assert laid("separators", six) == (4, ",", 4, ",", 4, "\n", 4, ",", 4, ",", 4)  # no whole
    assert laid("separators", alone) == (4,)
    places = ("(1,1,1)", "(1,1,2)", "(1,2,1)", "(1,2,2)", "(1,0,0)")
    assert laid("index", four, 1) == tuple(part for place in places for part in (place, 4))
    assert laid("index", alone, 2) == ("(2,0,0)", 4)


def test_what_makes_no_model():
    with pytest.raises(ConfigError, match=r"must be 'pad' for cover tiles"):
        TilingConfig("cover", resize="squash")
    with pytest.raises(ConfigError, match="'index' lays out tiling.type 'dynamic' or 'cover'"):
        ModelConfig(prompt=PromptConfig(merge="index"))
