"""Dynamic tiles: which grid, which pixels, and how pictures of one row share the budget."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import picture, tiny_config, tiny_vlm
from typer.testing import CliRunner

from mlxvlm.chat import Conversation
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig, TilingConfig, read_dataclass
from mlxvlm.errors import ConfigError, PictureError
from mlxvlm.images.dynamic import choose_grid
from mlxvlm.images.open import UPRIGHT, open_picture, upright_size
from mlxvlm.images.tiling import plan_cut, tile, tiles_each
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder
from mlxvlm.weights.save import save

# (width, height): (columns, rows, views) of at most 6 tiles, and of at most 12, of 448 pixels.
GRIDS = {
    **{(side, side): ((1, 1, 1), (1, 1, 1)) for side in (448, 336, 500, 317)},
    **{size: ((3, 2, 7), (4, 3, 13)) for size in ((800, 600), (640, 480), (1024, 768))},
    **{size: ((2, 1, 3), (4, 2, 9)) for size in ((1280, 720), (1920, 1080))},
    (1080, 1920): ((1, 2, 3), (2, 4, 9)),
    (900, 900): ((2, 2, 5), (2, 2, 5)),
    (634, 634): ((2, 2, 5), (2, 2, 5)),
    (1000, 1000): ((2, 2, 5), (3, 3, 10)),
    (2000, 2000): ((2, 2, 5), (3, 3, 10)),
    (1344, 448): ((3, 1, 4), (3, 1, 4)),
    (800, 1300): ((2, 3, 7), (2, 3, 7)),
    (4000, 500): ((6, 1, 7), (8, 1, 9)),
    (3000, 250): ((6, 1, 7), (12, 1, 13)),
    (100, 1000): ((1, 6, 7), (1, 10, 11)),
    # 1 x 1 and 3 x 2 are equally near: the larger needs more than half of its pixels.
    (560, 448): ((1, 1, 1), (4, 3, 13)),
    (450, 360): ((1, 1, 1), (4, 3, 13)),
    (1600, 1280): ((3, 2, 7), (4, 3, 13)),
}


@pytest.mark.parametrize("size", GRIDS)
def test_grids_are_internvls(size):
    for most, (columns, rows, views) in zip((6, 12), GRIDS[size], strict=True):
        tiling = TilingConfig("dynamic", 448, max_tiles=most)
        assert choose_grid(size, tiling) == (columns, rows)
        image = Image.new("RGB", size)
        assert plan_cut(image, tiling).views == views
        assert choose_grid(size, TilingConfig("dynamic", 448), most) == (columns, rows)


sides = st.one_of(st.integers(1, 3000), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(
    sides,
    sides,
    st.integers(1, 20),
    st.integers(1, 6),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 20)),
)
@example(1, 1, 12, 1, True, None)
@example(20000, 20, 12, 1, True, None)
@example(20, 20000, 48, 1, True, 3)
@example(20000, 20, 12, 6, False, 2)
def test_tiles_are_all_of_the_canvas_and_within_limits(width, height, most, least, thumbnail, row):
    tiling = TilingConfig(
        "dynamic", 8, min_tiles=min(least, most), max_tiles=most, use_thumbnail=thumbnail
    )
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    found = tile(image, tiling, row)
    rows, columns = found.grid
    limit = min(most, row or most)
    assert min(tiling.min_tiles, limit) <= rows * columns <= limit
    several = thumbnail and rows * columns > 1
    assert len(found.views) == rows * columns + several == plan_cut(image, tiling, row).views
    assert all(v.shape == (8, 8, 3) and v.dtype == np.uint8 for v in found.views)
    canvas = np.array(image.resize((8 * columns, 8 * rows), Image.Resampling.BICUBIC))
    tiles = iter(found.views)
    together = [np.hstack([next(tiles) for _ in range(columns)]) for _ in range(rows)]
    assert (np.vstack(together) == canvas).all()
    if several:
        assert (next(tiles) == np.array(image.resize((8, 8), Image.Resampling.BICUBIC))).all()


def test_pictures_of_a_row_share_the_budget():
    tiling = TilingConfig("dynamic", max_tiles=12)
    each = [tiles_each(tiling, among) for among in (1, 2, 3, 5, 12, 13, 40)]
    assert each == [None, 6, 4, 2, 1, 1, 1]
    assert tiles_each(TilingConfig(), 3) is None and tiles_each(TilingConfig(), 1, 6) is None
    # A source of rows may ask for less, and not for more.
    assert [tiles_each(tiling, among, 6) for among in (1, 2, 4, 9)] == [6, 3, 1, 1]
    assert [tiles_each(tiling, among, 40) for among in (1, 2)] == [None, 6]
    # A row's limit goes below a floor that is meant for pictures alone.
    assert choose_grid((900, 100), TilingConfig("dynamic", min_tiles=6), 2) == (2, 1)


def test_what_makes_no_tiling():
    for fields in ({"min_tiles": 0}, {"min_tiles": 3, "max_tiles": 2}, {"max_tiles": 0}):
        with pytest.raises(ConfigError, match="tiling.min_tiles .* and tiling.max_tiles"):
            TilingConfig("dynamic", **fields)
    with pytest.raises(ConfigError, match=r"tiling.resize \(='pad'\)"):
        TilingConfig("dynamic", resize="pad")
    with pytest.raises(ConfigError, match="max_tiles in 'tiling' must be a whole number"):
        read_dataclass(TilingConfig, {"max_tiles": "12"}, "tiling")


def test_an_encoder_is_known_by_what_its_views_depend_on():
    config = tiny_config().vision

    def identity(**fields: object) -> dict[str, object]:
        tiling = TilingConfig(image_size=32, **fields)  # type: ignore[arg-type]
        return Encoder(vision, config, tiling).identity()

    vision = build_vision(config)
    assert identity() == identity(max_tiles=3, use_thumbnail=False)
    dynamic = identity(type="dynamic")
    for name, value in (("max_tiles", 11), ("min_tiles", 2), ("use_thumbnail", False)):
        other = identity(type="dynamic", **{name: value})
        assert {k for k in other if other[k] != dynamic[k]} == {f"tiling.{name}"}
    assert identity(type="dynamic", background=(0, 0, 0)) == dynamic


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_size_is_read_from_the_header(tmp_path, kind):
    image = Image.fromarray(picture(0, 90)[:60])
    for orientation in (1, *UPRIGHT):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if kind in ("GIF", "BMP") else {"exif": exif}
        with io.BytesIO() as file:
            image.save(file, kind, **options)
            data = file.getvalue()
        assert upright_size(data) == open_picture(data)[0].size
        (tmp_path / "picture").write_bytes(data)
        assert upright_size(tmp_path / "picture") == upright_size(data)
    if kind in ("JPEG", "PNG"):  # what is cut short is found when it is read
        assert upright_size(data[: len(data) // 2]) == upright_size(data)
    with pytest.raises(PictureError, match="too large"):
        upright_size(data, max_pixels=5000)


def test_a_missing_or_broken_picture_has_no_size(tmp_path):
    with pytest.raises(PictureError, match="does not exist"):
        upright_size(tmp_path / "a.jpg")
    with pytest.raises(PictureError, match="not a picture"):
        upright_size(b"no picture at all")


def tiled(most: int = 6) -> ModelConfig:
    return tiny_config(tiling=TilingConfig("dynamic", 32, max_tiles=most))


def test_a_models_answer_sees_every_tile():
    vlm = tiny_vlm(tiled())
    wide = np.concatenate([picture(0), picture(1)], axis=1)
    question = [{"role": "user", "content": "What?"}]
    prompt = vlm.tokenize(question, [wide])
    # 3 x 1 and 2 x 1 and the like: 80 x 40 of 32 is 2 x 1 and a thumbnail.
    assert [len(p.views) for p in prompt.pictures] == [3]
    assert int((prompt.tokens == vlm.config.prompt.image_token_id).sum()) == 3 * 16
    changed = wide.copy()
    changed[:, 60:] = 0  # in the second tile
    one, other = (np.array(vlm(prompt.tokens, vlm.look([p]))) for p in (wide, changed))
    assert not np.allclose(one[0, -1], other[0, -1])


def test_pictures_that_are_shown_together_share_the_budget():
    vlm = tiny_vlm(tiled())
    wide = [np.concatenate([picture(i)] * 6, axis=1) for i in range(3)]
    chat = Conversation(vlm)
    chat.add(*wide)
    assert [len(p.views) for p in chat.pictures] == [3, 3, 3]  # 2 x 1, and a thumbnail
    chat.add(wide[0])
    assert len(chat.pictures[-1].views) == 7
    prompt = vlm.tokenize([{"role": "user", "content": "Which?"}], wide)
    assert [len(p.views) for p in prompt.pictures] == [3, 3, 3]


def test_build_gives_an_encoder_dynamic_tiles(tmp_path: Path):
    save(tiny_vlm(), tmp_path / "eyes")
    language = tmp_path / "language"
    language.mkdir()
    (language / "config.json").write_text(json.dumps(tiny_config().language))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tmp_path / "eyes" / name).exists():
            (language / name).write_bytes((tmp_path / "eyes" / name).read_bytes())
    words = ["build", "--vision", tmp_path / "eyes", "--language", language, "--fresh-language"]
    words += ["--projector-heads", 2, "--out"]

    def run(*more: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in (*words, *more)])
        return f"{done.exit_code} {done.output}"

    assert run(tmp_path / "a", "--tiling", "dynamic", "--max-tiles", 6).startswith(
        f"0 Saved {tmp_path / 'a'}: 16 visual tokens a view, 1 to 6 tiles a picture, and a thumb"
    )
    raw = json.loads((tmp_path / "a" / "config.json").read_text())["tiling"]
    assert (raw["type"], raw["max_tiles"], raw["use_thumbnail"]) == ("dynamic", 6, True)
    assert run(tmp_path / "b", "--max-tiles", 6).startswith("2 ")
    assert run(tmp_path / "c").startswith("0 ")
    raw = json.loads((tmp_path / "c" / "config.json").read_text())["tiling"]
    assert raw["type"] == "single"
