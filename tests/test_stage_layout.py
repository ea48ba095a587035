"""A stage may lay pictures and prompts out otherwise than the model that it starts from."""

import numpy as np
import pytest
from PIL import Image
from test_train import losses, place, train  # noqa: F401
from typer.testing import CliRunner

from mlxvlm.cli.main import app
from mlxvlm.config import TilingConfig
from mlxvlm.errors import CacheError, ConfigError
from mlxvlm.weights.load import load


def test_a_padded_canvas_has_the_mean_colour():
    tiling = TilingConfig(resize="crop").resized("pad", (0.48145466, 0.4578275, 0.40821073))
    assert (tiling.resize, tiling.background) == ("pad", (122, 116, 104))
    assert tiling.resized("crop", (0.5, 0.5, 0.5)).resize == "crop"


def test_the_result_keeps_what_its_stage_changed(place, tmp_path):  # noqa: F811
    """LLaVA-1.5's way: plain and cropped first, then a chat, padded."""
    before = load(place / "model").config
    train(place, "pretrain", tmp_path / "one", iters=1, resize="crop", layout="plain")
    first = load(tmp_path / "one").config
    assert (first.tiling.resize, first.prompt.layout) == ("crop", "plain")
    train(place, "sft", tmp_path / "two", model=str(tmp_path / "one"), iters=1, resize="pad")
    second = load(tmp_path / "two").config
    assert (second.tiling.resize, second.prompt.layout) == ("pad", "plain")
    assert second.prompt.image_token_id == before.prompt.image_token_id


def test_adapters_bring_their_layout(place, tmp_path):  # noqa: F811
    trainer = train(place, "lora", tmp_path / "out", iters=1, resize="pad", layout="plain")
    vlm = load(place / "model", adapter=tmp_path / "out")
    assert vlm.config.tiling == trainer.vlm.config.tiling and vlm.config.tiling.resize == "pad"
    assert vlm.config.prompt.layout == "plain"
    picture = Image.new("RGB", (60, 20), "red")
    seen = [v.look([picture])[0].views[0] for v in (vlm, load(place / "model"))]
    assert not np.array_equal(*seen)


def test_a_cache_is_of_one_way(place, tmp_path):  # noqa: F811
    model, data = place / "model", place / "data"
    command = ["cache-embeddings", str(data / "train.jsonl"), "--images", str(data / "images")]
    command += ["-m", str(model), "--codec", "float32", "--resize", "pad"]
    command += ["--out", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    flags = {"cache": str(tmp_path / "cache"), "iters": 2}
    with pytest.raises(CacheError, match="tiling.resize"):
        train(place, "pretrain", tmp_path / "no", **flags)
    train(place, "pretrain", tmp_path / "cached", **flags, resize="pad")
    train(place, "pretrain", tmp_path / "plain", iters=2, resize="pad")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), rtol=1e-5)


def test_a_way_that_is_none(place, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="resize"):
        train(place, "pretrain", tmp_path / "out", resize="stretch")
