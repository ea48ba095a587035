"""LLaVA-NeXT's folders without transformers: every layout loads, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import LAYOUTS, read, rewrite, write
from mlx.utils import tree_flatten
from tiny_vlm import picture

import mlxvlm
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.weights.load import load_encoder, load_projected
from mlxvlm.weights.save import save

LLAVA = Path(__file__).parent / "golden" / "llava"
SIDE, TOKENS, IMAGE = 14, 9, 63
PINPOINTS = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
NEWLINE = np.linspace(-1, 1, 32, dtype=np.float32)


def files() -> dict[str, Any]:
    raw = json.loads((LLAVA / "preprocessor_config.json").read_text())
    return {"preprocessor_config": {**raw, "image_grid_pinpoints": PINPOINTS}}


def next_folder(folder: Path, layout: str = "transformers5", **changes: Any) -> Path:
    """The golden LLaVA as a LLaVA-NeXT; changes: of config.json, a tensor's name to its value, or
    None to leave it out."""
    config, tensors = read(LLAVA)
    config |= {"model_type": "llava_next", "image_grid_pinpoints": PINPOINTS}
    tensors["image_newline"] = mx.array(NEWLINE)
    for name, value in changes.items():
        if name == "image_newline":
            tensors.pop(name) if value is None else tensors.update({name: value})
        else:
            config.pop(name, None) if value is None else config.update({name: value})
    write(folder / "next", config, tensors, **files())
    return rewrite(folder / "next", folder / layout, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_one_model(tmp_path: Path, layout: str) -> None:
    vlm = mlxvlm.load(next_folder(tmp_path, layout), dtype="float32")
    assert vlm.config.tiling.grids == ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
    assert vlm.config.prompt.merge == "spatial_unpad" and vlm.config.prompt.layout == "vicuna_v1"
    plain = mlxvlm.load(rewrite(LLAVA, tmp_path / "plain", "transformers5"), dtype="float32")
    (seen,) = vlm.look([picture(3)[:24]])  # 40 x 24: 28 x 17 in the middle of 28 x 28
    assert seen.grid == (2, 2) and len(seen.views) == 5
    visual = np.array(vlm.project([seen]))
    # What LLaVA, which knows of no tiles, makes of each view; and these put together by hand.
    each = [np.array(plain.project([mlxvlm.Picture([view])])) for view in seen.views]
    rows = []
    for y in range(6):
        for x in range(6):
            rows.append(each[1 + y // 3 * 2 + x // 3][y % 3 * 3 + x % 3])
        rows.append(NEWLINE)
    # int(24 * 6 / 40) = 3 rows of tokens; (6 - 3) // 2 = 1 is left out above and below.
    wanted = np.concatenate([each[0], np.stack(rows).reshape(6, 7, -1)[1:5].reshape(28, -1)])
    np.testing.assert_allclose(visual, wanted, rtol=1e-5, atol=1e-4)
    assert vlm(np.array([[1, *[IMAGE] * 37, 5]]), [seen]).shape == (1, 39, 64)


def test_it_is_saved_in_our_own_layout(tmp_path: Path) -> None:
    vlm = mlxvlm.load(next_folder(tmp_path))
    save(vlm, tmp_path / "own")
    again = mlxvlm.load(tmp_path / "own")
    assert again.config == vlm.config
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (again, vlm))
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())
    assert "projector.image_newline" in theirs
    for folder in (tmp_path / "own", tmp_path / "next"):
        assert load_encoder(folder).tiling == vlm.config.tiling
        identity = load_projected(folder).identity()
        assert identity == vlm.projected_encoder.identity()


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for number, (value, told) in enumerate(
        (
            (None, "missing: projector.image_newline"),
            (mx.zeros((31,)), r"projector.image_newline is \[31\] and should be \[32\]"),
            (mx.full((32,), mx.nan), "with NaN or infinite values: projector.image_newline"),
        )
    ):
        folder = next_folder(tmp_path / str(number), image_newline=value)
        with pytest.raises(WeightsError, match=told):
            mlxvlm.load(folder)
    # LLaVA has no such tensor.
    config, tensors = read(LLAVA)
    tensors["image_newline"] = mx.array(NEWLINE)
    with pytest.raises(WeightsError, match="unexpected: image_newline"):
        mlxvlm.load(write(tmp_path / "plain", config, tensors))


@pytest.mark.parametrize(
    "pinpoints", [[[14, 20]], [[14]], [14, 28], [["14", 28]], [[0, 14]], {"a": 1}]
)
def test_pinpoints_that_make_no_tiles_are_named(tmp_path: Path, pinpoints: Any) -> None:
    folder = next_folder(tmp_path, image_grid_pinpoints=pinpoints)
    (folder / "preprocessor_config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="must be pairs of multiples of the tower's 14 pixels"):
        mlxvlm.load(folder)


def test_pinpoints_that_differ_between_files_are_refused(tmp_path: Path) -> None:
    folder = next_folder(tmp_path, image_grid_pinpoints=[[14, 28]])
    with pytest.raises(ConfigError, match="must be the same"):
        mlxvlm.load(folder)


def test_without_pinpoints_they_are_transformers_default_in_tiles(tmp_path: Path) -> None:
    folder = next_folder(tmp_path, image_grid_pinpoints=None)
    assert mlxvlm.load(folder).config.tiling.grids == ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


def test_a_tower_whose_tokens_are_no_square_is_refused(tmp_path: Path) -> None:
    folder = next_folder(tmp_path, vision_feature_select_strategy="default")
    with pytest.raises(ConfigError, match="whole square grid of patches, not 8 tokens a view"):
        mlxvlm.load(folder)


def test_other_tokens_may_not_stand_in_a_picture(tmp_path: Path) -> None:
    vlm = mlxvlm.load(next_folder(tmp_path))
    (seen,) = vlm.look([picture(3)[:24]])
    tokens = [1, *[IMAGE] * 20, 7, *[IMAGE] * 17]
    with pytest.raises(mlxvlm.VLMError, match="other tokens stand among 37 image tokens"):
        vlm(np.array([tokens]), [seen])
    with pytest.raises(mlxvlm.VLMError, match="do not fill exactly"):
        vlm(np.array([[1, *[IMAGE] * 36]]), [seen])
