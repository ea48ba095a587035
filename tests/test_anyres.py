"""Any-resolution tiles: which canvas, which pixels, and how many visual tokens they become."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import tiny_config

from mlxvlm.config import (
    TILINGS,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    TilingConfig,
    VisionConfig,
)
from mlxvlm.errors import ConfigError, PromptError
from mlxvlm.images.anyres import choose_grid, resized
from mlxvlm.images.picture import Cut
from mlxvlm.images.tiling import plan_cut, tile, tiles_each
from mlxvlm.merge import MERGES, NEWLINE, visual_tokens

# Pinpoints as LLaVA's own code reads them, (width, height): of equals, the upright one is first.
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def llava_next(**fields: object) -> ModelConfig:
    """CLIP-L/14 at 336 pixels, 576 tokens a view."""
    tiling = TilingConfig("anyres", 336, background=(0, 0, 0), **{"grids": NEXT} | fields)  # type: ignore[arg-type]
    vision = VisionConfig(image_size=336, patch_size=14)
    return ModelConfig(tiling, vision, prompt=PromptConfig(merge="spatial_unpad"))


def llava_hd() -> ModelConfig:
    """CLIP-L/14 at 224 pixels, 256 tokens a view, and every grid of at most six tiles."""
    tiling = TilingConfig(image_size=224, **TILINGS["anyres-hd"])
    vision = VisionConfig(image_size=224, patch_size=14)
    return ModelConfig(tiling, vision, prompt=PromptConfig(merge="spatial_unpad"))


# Of a picture (width, height): canvas, the picture in it, its tokens in columns and rows, and all.
TABLE = {
    (336, 336): ((336, 672), (336, 336), (24, 24), 1176),
    (100, 100): ((336, 672), (336, 336), (24, 24), 1176),
    (640, 480): ((672, 672), (672, 504), (48, 36), 2340),
    (480, 640): ((672, 672), (504, 672), (36, 48), 2352),
    (1000, 500): ((672, 336), (672, 336), (48, 24), 1752),
    (500, 1000): ((336, 672), (336, 672), (24, 48), 1776),
    (1920, 1080): ((672, 672), (672, 378), (48, 28), 1948),
    (1200, 300): ((1008, 336), (1008, 252), (72, 18), 1890),
    (300, 1200): ((336, 1008), (252, 1008), (18, 72), 1944),
    (2000, 2000): ((672, 672), (672, 672), (48, 48), 2928),
}
HD = {
    (224, 224): ((224, 224), (16, 16), 528),
    (448, 448): ((448, 448), (32, 32), 1312),
    (640, 480): ((672, 448), (42, 32), 1632),
    (480, 640): ((448, 672), (32, 42), 1642),
    (1600, 300): ((1344, 224), (86, 16), 1648),
    (336, 336): ((448, 448), None, None),
}


@pytest.mark.parametrize("size", TABLE)
def test_llava_next_has_these_canvases_and_tokens(size):
    config = llava_next()
    canvas, inner, kept, tokens = TABLE[size]
    columns, rows = canvas[0] // 336, canvas[1] // 336
    assert choose_grid(size, config.tiling) == (columns, rows)
    assert resized(size, canvas) == inner
    cut = plan_cut(Image.new("RGB", size), config.tiling)
    assert cut == Cut(1 + columns * rows, (rows, columns), size)
    assert visual_tokens(config, cut) == tokens == 576 + kept[1] * (kept[0] + 1)
    order = MERGES["spatial_unpad"].order(cut, 576)
    assert len(order) == tokens and (order == NEWLINE).sum() == kept[1]


@pytest.mark.parametrize("size", HD)
def test_llava_1_5_hd_has_these_canvases_and_tokens(size):
    config = llava_hd()
    canvas, kept, tokens = HD[size]
    columns, rows = canvas[0] // 224, canvas[1] // 224
    assert choose_grid(size, config.tiling) == (columns, rows)
    if tokens is None or kept is None:
        return
    cut = plan_cut(Image.new("RGB", size), config.tiling)
    assert visual_tokens(config, cut) == tokens == 256 + kept[1] * (kept[0] + 1)


def test_llava_1_5_hd_chooses_among_fourteen_grids():
    sizes = [(w, h) for w in range(1, 3000, 7) for h in range(1, 3000, 53)]
    found = {choose_grid(size, llava_hd().tiling) for size in sizes}
    grids = {(a, b) for a in range(1, 7) for b in range(1, 7) if a * b <= 6}
    assert found == grids and len(grids) == 14


sides = st.one_of(st.integers(1, 3000), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from(["anyres", "anyres-hd"]), st.integers(1, 7) | st.none())
@example(1, 1, "anyres", None)
@example(20000, 20, "anyres", None)
@example(20, 20000, "anyres", None)
@example(20000, 20, "anyres-hd", None)
@example(20, 20000, "anyres-hd", 3)
@example(20000, 20, "anyres", 1)
def test_tiles_are_all_of_the_canvas_and_tokens_all_of_the_picture(width, height, name, row):
    side, each = 8, 16
    tiling = TilingConfig(image_size=side, **{**TILINGS[name], "background": (9, 9, 9)})
    # No pixel has the background's colour, so that none of the picture can hide as padding.
    image = Image.linear_gradient("L").point(lambda v: 40 + v // 2)
    image = image.resize((width, height)).convert("RGB")
    found = tile(image, tiling, row)
    cut = found.cut
    assert cut == plan_cut(image, tiling, row)
    assert all(v.shape == (side, side, 3) and v.dtype == np.uint8 for v in found.views)
    whole = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
    assert (found.views[0] == whole).all()
    order = MERGES["spatial_unpad"].order(cut, each)
    count = MERGES["spatial_unpad"].count(cut, each)
    assert len(order) == count <= each + tiling.max_tiles * each + 4 * 4 * tiling.max_tiles
    assert (order[:each] == np.arange(each)).all()
    if cut.views == 1:
        assert row is not None and order[each:].tolist() == [NEWLINE]
        return
    rows, columns = cut.grid
    assert 1 <= rows * columns == cut.views - 1 <= min(tiling.max_tiles, row or 99)
    tiles = iter(found.views[1:])
    canvas = np.vstack([np.hstack([next(tiles) for _ in range(columns)]) for _ in range(rows)])
    inner = (canvas != 9).all(axis=-1)
    down, across = inner.any(axis=1), inner.any(axis=0)
    size = resized((width, height), (columns * side, rows * side))
    assert (across.sum(), down.sum()) == size and inner.sum() == size[0] * size[1]
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
    assert (canvas[down][:, across] == pixels).all()
    # What is left out lies in the padding, but for a token that its roundings cut (both ends).
    kept = order[each:][order[each:] != NEWLINE]
    assert len(set(kept.tolist())) == len(kept)
    lines = np.split(order[each:], np.flatnonzero(order[each:] == NEWLINE) + 1)[:-1]
    assert len({len(line) for line in lines}) <= 1
    places = {t: at for at, t in np.ndenumerate(_map(rows, columns, 4))}
    there = {places[t] for t in kept.tolist()}
    patch = side // 4
    for y in range(rows * 4):
        for x in range(columns * 4):
            block = inner[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            if block.all() and min(size) >= 3 * patch:
                assert (y, x) in there


def _map(rows: int, columns: int, side: int) -> np.ndarray:
    """Number of the token at each place of the tiles put together, slowly."""
    found = np.zeros((rows * side, columns * side), np.int64)
    for y in range(rows * side):
        for x in range(columns * side):
            number = 1 + y // side * columns + x // side
            found[y, x] = number * side**2 + y % side * side + x % side
    return found


def test_the_order_of_a_small_map():
    # 2 x 1 tiles of 2 x 2 tokens, nothing padded: the picture at the head of `merge`.
    order = MERGES["spatial_unpad"].order(Cut(3, (1, 2), (20, 10)), 4)
    assert order.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    # 1 x 2 tiles of 2 x 2, a square in the middle: rows 1 and 2 of four.
    order = MERGES["spatial_unpad"].order(Cut(3, (2, 1), (10, 10)), 4)
    assert order.tolist() == [0, 1, 2, 3, 6, 7, -1, 8, 9, -1]


def test_each_picture_of_a_row_has_its_own_tiles():
    tiling = llava_next().tiling
    assert tiling.max_tiles == 4
    assert [tiles_each(tiling, among) for among in (1, 2, 40)] == [None, None, None]
    assert [tiles_each(tiling, among, 3) for among in (1, 2)] == [3, 3]
    assert choose_grid((2000, 2000), tiling, 3) == (1, 2)
    assert choose_grid((2000, 2000), tiling, 1) is None


def test_what_makes_no_such_tiling_or_merge():
    with pytest.raises(ConfigError, match=r"tiling.resize \(='crop'\) must be 'squash' for anyres"):
        TilingConfig("anyres", resize="crop")
    for grids in ((2, 1), [[0, 1]], [[1, 2, 3]], [["2", 1]], 3):
        with pytest.raises(ConfigError, match="tiling.grids .* must be pairs"):
            TilingConfig("anyres", grids=grids)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="belong to 'anyres'"):
        TilingConfig("dynamic", grids=((1, 2),))
    with pytest.raises(ConfigError, match="lays out tiling.type 'anyres', not 'single'"):
        tiny_config(prompt=PromptConfig(merge="spatial_unpad"))
    with pytest.raises(ConfigError, match="whole square grid of patches, not 15"):
        config = tiny_config()
        config.vision.vision_feature_select_strategy = "default"
        ModelConfig(
            TilingConfig(image_size=32, **TILINGS["anyres"]),
            config.vision,
            prompt=PromptConfig(merge="spatial_unpad"),
        )
    queries = ProjectorConfig("resampler", num_query_tokens=16)  # a square number, and no map
    with pytest.raises(ConfigError, match="one map .* 'resampler' gives queries, which are none"):
        dataclasses.replace(llava_next(), projector=queries)
    for cut in (Cut(3, (1, 2)), Cut(4, (1, 2), (9, 9))):
        with pytest.raises(PromptError, match="needs to know a picture's size and grid"):
            visual_tokens(llava_next(), cut)


def test_a_config_goes_to_json_and_back():
    config = tiny_config(
        tiling=TilingConfig(image_size=32, **TILINGS["anyres"]),
        prompt=PromptConfig(merge="spatial_unpad"),
    )
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.tiling.grids == TILINGS["anyres"]["grids"]
    identity = config.tiling.identity()
    assert TilingConfig(**identity).identity() == identity
    assert identity["background"] == [0, 0, 0] and "use_thumbnail" not in identity
