"""LLaVA-NeXT's tiles through the commands: build, plan, cache, train with and without it, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cache import EmbeddingCache
from mlxvlm.cli.main import app
from mlxvlm.data.batching import Batching
from mlxvlm.data.buckets import collate, group
from mlxvlm.data.feed import Feed, Pictures
from mlxvlm.data.packing import collate_lines
from mlxvlm.data.samples import prepare
from mlxvlm.data.sources import read_rows
from mlxvlm.images.picture import Features, Picture
from mlxvlm.machine.study import Study, Variant
from mlxvlm.merge import visual_tokens
from mlxvlm.reuse import Reuse
from mlxvlm.train.loop import Trainer
from mlxvlm.train.losses import batch_loss, count, gradients
from mlxvlm.train.stages import stage_config
from mlxvlm.vision.siglip import SiglipVision
from mlxvlm.weights.save import save

SIZES = ((200, 30), (30, 30), (90, 60), (40, 250))


def command(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, a language model, a model built of them, four pictures, and rows of one to three."""
    place = tmp_path_factory.mktemp("anyres")
    vlm = tiny_vlm()
    save(vlm, place / "eyes")
    language = place / "language"
    language.mkdir()
    raw = {**tiny_config().language, "max_position_embeddings": 4096}
    (language / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (place / "eyes" / name).exists():
            (language / name).write_bytes((place / "eyes" / name).read_bytes())
    said = command(*build_words(place), "--tiling", "anyres", "--out", place / "model")
    assert "16 visual tokens a view, 2 to 4 tiles a picture, and the whole" in said, said
    (place / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")

    def row(*images: int, text: str) -> dict[str, Any]:
        question = {"role": "user", "content": "What?"}
        return {
            "images": [f"{i}.png" for i in images],
            "messages": [question, {"role": "assistant", "content": text}],
        }

    rows = [row(0, text="one"), row(0, 1, 2, text="three"), row(2, 3, text="two"), row(1, text="a")]
    rows.append(row(text="no picture at all"))
    (place / "rows.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    return place


def build_words(place: Path) -> list[object]:
    parts = ["--vision", place / "eyes", "--language", place / "language", "--fresh-language"]
    return ["build", *parts, "--projector", "mlp"]


def train(place: Path, out: Path, stage: str, *more: object) -> list[float]:
    words = [stage, "-m", place / "model", "--data", place / "rows.jsonl", "--iters", 5]
    words += ["--batch-size", 2, "--max-seq-length", 1024, "--seed", 3, "--strict", "--out", out]
    command(*words, *more)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def cached(place: Path, out: Path, *more: object) -> Path:
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    command(*words, "-m", place / "model", "--out", out, "--codec", "float32", *more)
    return out


def test_a_built_model_has_tiles_and_a_newline(place):
    raw = json.loads((place / "model" / "config.json").read_text())
    assert raw["tiling"]["type"] == "anyres" and raw["prompt"]["merge"] == "spatial_unpad"
    assert raw["tiling"]["grids"] == [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
    vlm = mlxvlm.load(place / "model")
    assert vlm.projector.image_newline.shape == (64,)
    prompt = vlm.tokenize([{"role": "user", "content": "?"}], [place / "images" / "0.png"])
    # 3 x 1 tiles of 4 x 4 tokens, of which a strip of 2 rows is no padding.
    assert prompt.pictures[0].cut.views == 4 and prompt.slots[0][1] == 16 + 2 * (12 + 1)
    assert vlm.generate([{"role": "user", "content": "?"}], prompt.pictures, max_tokens=4).tokens


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("batching", ["buckets", "pack"])
def test_training_with_the_cache_equals_training_without(place, tmp_path, stage, batching):
    cache = cached(place, tmp_path / "cache")
    more = ["--batching", batching]
    plain = train(place, tmp_path / "a", stage, "--images", place / "images", *more)
    there = train(place, tmp_path / "b", stage, "--cache", cache, *more)
    assert len(set(plain)) >= 3
    np.testing.assert_allclose(there, plain, rtol=1e-5)
    both = place / "model", tmp_path / "b"
    before, after = (mlxvlm.load(folder).projector["image_newline"] for folder in both)
    assert mx.abs(before - after).max().item() > 1e-5


def test_a_cache_behind_the_projector_is_merged_too(place, tmp_path):
    cache = cached(place, tmp_path / "cache", "--at", "projector")
    more = ["--train", "lm"]
    plain = train(place, tmp_path / "a", "sft", "--images", place / "images", *more)
    there = train(place, tmp_path / "b", "sft", "--cache", cache, *more)
    np.testing.assert_allclose(there, plain, rtol=1e-5)


def test_a_resumed_run_is_an_uninterrupted_one(place, tmp_path):
    def run(name: str, **more: Any) -> Trainer:
        flags = {"model": place / "model", "data": place / "rows.jsonl"}
        flags |= {"images": place / "images", "out": tmp_path / name}
        flags = {key: str(path) for key, path in flags.items()}
        counts = {"batch_size": 2, "iters": 5, "save_every": 2, "max_seq_length": 1024}
        return Trainer(stage_config("pretrain", {**flags, **counts, **more}), stop)

    def stop(kind: str, values: dict[str, Any]) -> None:
        if kind == "checkpoint" and values["step"] == 2 and cut:
            raise RuntimeError("pulled the plug")

    cut = True
    with pytest.raises(RuntimeError, match="plug"):
        run("b").run()
    cut = False
    run("a").run()
    run("b", resume=True).run()
    whole, resumed = (dict(tree_flatten(mlxvlm.load(tmp_path / n).parameters())) for n in "ab")
    assert all(mx.array_equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("kind", ["lines", "one by one", "of one picture"])
def test_rows_that_meet_have_the_loss_of_rows_alone(place, kind):
    """Pictures of other tiles in one batch and line, and rows without; the gradient in the newline
    and the projector is the same too."""
    vlm = mlxvlm.load(place / "model")
    rows, found = samples(place, vlm)
    vlm.freeze()
    vlm.projector.unfreeze()

    def step(batches: list[tuple[Any, list[Any]]]) -> tuple[float, dict[str, mx.array]]:
        totals, loss, sums = count([batch for batch, _ in batches]), 0.0, {}
        for batch, pictures in batches:
            views = found.views(pictures)
            step = nn.value_and_grad(vlm, batch_loss)
            flat, parts = gradients(step, vlm, batch, views, {}, totals)
            loss += parts["loss"].item()
            sums = {name: g + sums.get(name, 0) for name, g in flat.items()}
        return loss, sums

    alone = step([(collate(group([row], 0), 8), found.of(row)) for row in rows])
    pictures = [picture for row in rows for picture in found.of(row)]
    if kind == "lines":
        together = [(collate_lines([rows[:3], rows[3:]], 1024), pictures)]
    elif kind == "one by one":
        together = [(collate(group(rows, 0), 8), pictures)]
    else:  # rows that share the tokens up to a picture's end
        rows = [rows[0].again(1), rows[0].again(2)]
        alone = step([(collate(group([row], 0), 8), found.of(row)) for row in rows])
        together = [(collate(group(rows, 2), 8), found.of(rows[0]))]
        assert together[0][0].prefix is not None
    meeting = step(together)
    assert meeting[0] == pytest.approx(alone[0], abs=1e-5)
    for name, gradient in alone[1].items():
        assert mx.abs(gradient).max().item() > 1e-6, name
        assert mx.abs(meeting[1][name] - gradient).max().item() < 1e-5, name


def test_a_picture_that_was_changed_since_costs_its_row(place, tmp_path):
    vlm = mlxvlm.load(place / "model")
    images = tmp_path / "images"
    shutil.copytree(place / "images", images)
    rows, found = samples(place, vlm, images)
    feed = Feed(rows, found, Batching(1))
    Image.new("RGB", (30, 60)).save(images / "3.png")
    assert sum(feed.fetch(micro)[0] is None for micro in feed.plan.epoch(0)) == 1
    assert "3.png has changed since its row was read" in "".join(feed.failed.values())


def samples(place: Path, vlm: Any, images: Path | None = None) -> tuple[list[Any], Pictures]:
    found = Pictures(vlm.encoder, images or place / "images")
    rows = read_rows(str(place / "rows.jsonl"))
    made, skipped = prepare(rows, vlm.tokenizer, vlm.config, found.cut, 4096)
    assert len(made) == 5 and not skipped
    return made, found


def test_a_cache_knows_the_tiles_of_each_picture(place, tmp_path):
    vlm = mlxvlm.load(place / "model")
    with EmbeddingCache.open(cached(place, tmp_path / "cache")) as cache:
        assert cache.totals().tilings == 4  # a picture has the same tiles in every row
        for i, size in enumerate(SIZES):
            (picture,) = vlm.look([place / "images" / f"{i}.png"])
            assert cache.cut(f"{i}.png") == picture.cut and picture.cut.size == size
            features = cache.get(f"{i}.png")
            tokens = np.concatenate([[256 + 5] * visual_tokens(vlm.config, picture.cut), [7]])
            seen, kept = (np.array(vlm(tokens, [p])) for p in (picture, features))
            np.testing.assert_allclose(kept, seen, atol=1e-4)


def test_a_plan_tries_fewer_tokens_a_tile(place):
    """Rows are as long as with `--pool mean2`: the map of 2 x 2 tokens a tile loses its padding."""
    flags = {"model": str(place / "model"), "data": str(place / "rows.jsonl")}
    flags |= {"images": str(place / "images"), "out": "nowhere"}
    study = Study(stage_config("pretrain", flags | {"max_seq_length": 1024}))
    before, after = (study._feed(Variant(study.config, pool=p)).groups for p in ("", "mean2"))
    vlm = mlxvlm.load(place / "model")
    vlm.config.projector.pool = "mean2"
    for was, now in zip(before, after, strict=True):
        (row,), (sample,) = was.rows, now.rows
        wanted = sum(visual_tokens(vlm.config, cut) for cut in row.cuts)
        assert sample.num_visual == wanted and sample.cuts == row.cuts
        assert sample.length - wanted == row.length - row.num_visual
    assert len({group.rows[0].num_visual for group in after}) > 3
    fewer = study.step(Variant(study.config, pool="mean2"))
    assert fewer.flops < study.step().flops


@pytest.mark.parametrize("at", ["encoder", "projector"])
def test_a_chat_takes_tiles_from_a_cache(place, tmp_path, monkeypatch, at):
    """Pictures that are in the cache and one that is not, in one prompt; then its keys, on disk."""
    Image.effect_noise((50, 70), 90).save(tmp_path / "new.png")
    views: list[int] = []
    call = SiglipVision.__call__
    monkeypatch.setattr(SiglipVision, "__call__", lambda s, x: views.append(len(x)) or call(s, x))

    shown = [place / "images" / "0.png", tmp_path / "new.png", place / "images" / "3.png"]

    def chat(*more: object) -> dict[str, Any]:
        words = ["chat", *shown, "-m", place / "model", "-p", "Why?", "--max-tokens", 9, "--json"]
        done = CliRunner().invoke(app, [str(word) for word in [*words, *more]])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    cache = cached(place, tmp_path / "cache", "--at", at)
    views.clear()
    fresh = chat()
    assert sum(views) == 4 + 5 + 4
    views.clear()
    for known in (0, 100):
        reply = chat("--cache", cache, "--prompt-cache", tmp_path / "prompts")
        assert (reply["text"], reply["prompt_tokens"]) == (fresh["text"], fresh["prompt_tokens"])
        assert reply["reused_tokens"] >= known and sum(views) == 5
    vlm = mlxvlm.load(place / "model")
    with EmbeddingCache.open(cache) as opened:
        found = Reuse(vlm, cache=opened).look(shown)
        assert [type(one) for one in found] == [Features, Picture, Features]
        seen, kept = (np.array(vlm.project(pictures)) for pictures in (vlm.look(shown), found))
        np.testing.assert_allclose(kept, seen, atol=1e-5)


def test_flags_that_do_not_go_together(place, tmp_path):
    words = [*build_words(place), "--out", tmp_path / "x"]
    for flags, told in {
        ("--grids", "1x2"): "--grids belongs to --tiling anyres",
        ("--tiling", "anyres", "--max-tiles", "3"): "belongs to --tiling dynamic, anyres-hd, ",
        ("--tiling", "anyres-hd", "--thumbnail"): "belong to --tiling dynamic",
        ("--tiling", "anyres", "--grids", "2"): "must be columns and rows",
        ("--tiling", "anyres", "--resize", "pad"): "must be 'squash' for anyres",
        ("--tiling", "anyres", "--projector", "resampler"): "or 'dynamic' tiles, which go with any",
    }.items():
        configured = "--resize" in flags or "--projector" in flags
        said = command(*words, *flags, code=1 if configured else 2)
        assert told in " ".join(said.split()), said


def test_grids_of_ones_own_and_hds(place, tmp_path):
    words = build_words(place)
    said = command(*words, "--tiling", "anyres", "--grids", "4x1,1x4", "--out", tmp_path / "own")
    assert ", 4 tiles a picture, and the whole" in said
    said = command(*words, "--tiling", "anyres-hd", "--out", tmp_path / "hd")
    assert "1 to 6 tiles a picture, and the whole" in said
    # An encoder is taken out of a model with tiles, and given others.
    eyes = [*words[:2], tmp_path / "own", *words[3:]]
    said = command(*eyes, "--tiling", "dynamic", "--out", tmp_path / "dynamic")
    assert "1 to 12 tiles a picture, and a thumbnail" in said
    command(*eyes, "--out", tmp_path / "same")
    assert mlxvlm.load(tmp_path / "same").config.tiling.grids == ((4, 1), (1, 4))
