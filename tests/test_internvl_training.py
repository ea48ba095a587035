"""What InternVL 2.5's training has of its own: drop path, and a tower that moves under another
language model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read
from internvl_folders import write_internvl
from mlx.utils import tree_flatten
from PIL import Image
from test_internvl_folders import INTERNVIT_300M, run
from tiny_vlm import picture

import mlxvlm
from mlxvlm.errors import UsageError
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import refuse_idle, stage_config
from mlxvlm.vision.blocks import DropPath, set_drop_path
from mlxvlm.vision.build import build_vision


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl")
    write_internvl(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for i in range(4):
        Image.fromarray(picture(i, 64)[: 32 * (1 + i % 2)]).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "red " * (1 + i)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(place: Path, out: Path, **flags):
    names = {"model": "model", "data": "rows.jsonl", "images": "images"}
    given = {name: str(place / value) for name, value in names.items()}
    given |= {"out": str(out), "train": "projector,vision", "learning_rate": 1e-3}
    given |= {"iters": 6, "batch_size": 2, "save_every": 0, "vision_drop_path": 0.5}
    return stage_config("pretrain", given | flags)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_branch_is_dropped_for_whole_rows_in_training_alone():
    drop = DropPath()
    branch = mx.ones((4000, 2, 3))
    assert drop(branch) is branch  # no rate
    drop.rate = 0.25
    mx.random.seed(4)
    kept = np.array(drop(branch))
    assert (kept == kept[:, :1, :1]).all()
    share = (kept[:, 0, 0] == 0).mean()
    assert abs(share - 0.25) < 0.03 and np.allclose(kept[kept > 0], 1 / 0.75)
    mx.random.seed(4)
    assert (np.array(drop(branch)) == kept).all()
    assert drop.eval()(branch) is branch


def test_rates_grow_evenly_over_the_blocks():
    tower = build_vision(INTERNVIT_300M)
    set_drop_path(tower, 0.1)
    rates = [layer.drop_path.rate for layer in tower.encoder.layers]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 24))


def test_a_block_loses_what_it_would_add(place):
    """Of two blocks at rate 1 in 2, a view's features are one of four combinations."""
    tower = mlxvlm.load(place / "model").vision
    pixels = mx.random.normal((16, 32, 32, 3))
    set_drop_path(tower, 0.5)
    whole = np.array(tower(pixels))
    tower.train()
    mx.random.seed(0)
    dropped = np.array(tower(pixels))
    x = tower.encoder.layers[0](tower.embeddings(pixels))
    last = tower.encoder.layers[1]
    branches = []
    for attn in (0, 2):
        y = x + attn * last.ls1 * last.attn(last.norm1(x))
        for mlp in (0, 2):
            branches.append(np.array(y + mlp * last.ls2 * last.mlp(last.norm2(y)))[:, 1:])
    off = np.abs(np.stack(branches) - dropped).max((2, 3))
    assert (off.min(0) < 1e-5).all() and len(set(off.argmin(0).tolist())) == 4
    assert (np.array(tower.eval()(pixels)) == whole).all()


@pytest.mark.parametrize("parts", ["projector,vision", "projector,lora:vision"])
def test_resumed_with_drop_path_equals_uninterrupted(place, tmp_path, parts):
    flags = {"save_every": 2, "train": parts, "val_data": str(place / "rows.jsonl")}
    whole = Trainer(config(place, tmp_path / "whole", **flags, steps_per_eval=2))
    whole.run()

    def stop(kind, values):
        if kind == "checkpoint" and values["step"] == 4:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config(place, tmp_path / "cut", **flags, steps_per_eval=2), stop).run()
    again = Trainer(config(place, tmp_path / "cut", **flags, steps_per_eval=2, resume=True))
    again.run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (dict(tree_flatten(t.vlm.parameters())) for t in (again, whole))
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())


def test_drop_path_is_felt_in_training_and_not_in_validation(place, tmp_path):
    flags = {"learning_rate": 1e-9, "iters": 2, "val_data": str(place / "rows.jsonl")}
    flags["steps_per_eval"] = 1
    said = {}
    for rate in (0.0, 0.9):
        out = tmp_path / str(rate)
        Trainer(config(place, out, **flags, vision_drop_path=rate)).run()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        said[rate] = [(line["loss"], line["val_loss"]) for line in lines]
    (on, on_val), (off, off_val) = said[0.9][0], said[0.0][0]
    assert abs(on - off) > 1e-4 and abs(on_val - off_val) < 1e-5


def test_recomputed_blocks_drop_what_they_dropped(place, tmp_path):
    for again in (False, True):
        Trainer(config(place, tmp_path / str(again), grad_checkpoint=again)).run()
    np.testing.assert_allclose(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=1e-5)


def test_drop_path_is_of_a_tower_that_trains(place, tmp_path):
    flags = {"vision_drop_path": 0.1}
    idle = config(place, tmp_path, **flags, train="projector")
    with pytest.raises(UsageError, match="--vision-drop-path is of the vision tower"):
        refuse_idle("pretrain", flags, idle)
    with pytest.raises(UsageError, match="--vision-drop-path .* from 0 to less than 1"):
        config(place, tmp_path, vision_drop_path=1.0)


def test_a_trained_tower_moves_under_a_larger_language_model(place, tmp_path):
    """Progressive scaling: the tower to the bit, a fresh projector of its kind, ready to train."""
    Trainer(config(place, tmp_path / "small", iters=2)).run()
    raw = read(place / "model")[0]["text_config"]
    wide = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3}
    (tmp_path / "language").mkdir()
    (tmp_path / "language" / "config.json").write_text(json.dumps({**raw, **wide}))
    tokens = (place / "model" / "tokenizer.json").read_bytes()
    (tmp_path / "language" / "tokenizer.json").write_bytes(tokens)
    words = ["build", "--vision", tmp_path / "small", "--language", tmp_path / "language"]
    words += ["--fresh-language", "--layout", "internvl2_5", "--out", tmp_path / "large"]
    assert "4 visual tokens a view, 1 to 6 tiles" in run(*words)
    small, large = (mlxvlm.load(tmp_path / name) for name in ("small", "large"))
    before = mlxvlm.load(place / "model")
    assert large.encoder.identity() == small.encoder.identity() != before.encoder.identity()
    assert large.config.projector == small.config.projector == before.config.projector
    (seen,) = small.look([picture(7, 90)[:50]])
    ours, theirs = (vlm.features([seen])[0].array for vlm in (large, small))
    assert mx.array_equal(ours, theirs).item()
    assert large.project([seen]).shape == (len(seen.views) * 4, 96)
    flags = {"model": str(tmp_path / "large"), "iters": 2, "train": "projector"}
    Trainer(config(place, tmp_path / "out", **flags, vision_drop_path=0.0)).run()
    assert len(losses(tmp_path / "out")) == 2
