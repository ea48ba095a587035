"""Slices of many shapes through the commands: plan, cache, train with and without it, chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from minicpm_folders import write_minicpm
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.packed import unpack
from mlxvlm.cli.main import app
from mlxvlm.weights.save import save

SIZES = ((100, 30), (30, 30), (45, 60), (20, 97))


def command(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


def row(text: str, *images: int) -> dict[str, Any]:
    asked = {"role": "user", "content": "What is this?"}
    found: dict[str, Any] = {"messages": [asked, {"role": "assistant", "content": text}]}
    return found | ({"images": [f"{i}.png" for i in images]} if images else {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, four pictures, rows of none to three of them, and a cache."""
    place = tmp_path_factory.mktemp("slices")
    write_minicpm(place / "model")
    (place / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")
    rows = [
        row("One.", 0),
        row("Three of them.", 0, 1, 2),
        row("No picture."),
        row("Two.", 3, 0),
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command(*cached(place), "--codec", "float32")
    return place


def cached(place: Path) -> list[object]:
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    return [*words, "-m", place / "model", "--out", place / "cache"]


def test_the_cache_holds_each_view_with_its_own_number_of_tokens(place: Path) -> None:
    vlm = mlxvlm.load(place / "model")
    with EmbeddingCache.open(place / "cache") as cache:
        assert cache.totals().pictures == len(SIZES)
        shapes = set()
        for i in range(len(SIZES)):
            (want,) = vlm.features([place / "images" / f"{i}.png"])
            got = cache.get(f"{i}.png")
            assert (got.grid, got.size) == (want.grid, want.size)
            for one, other in zip(want.views, got.views, strict=True):
                np.testing.assert_allclose(np.array(one), other, atol=1e-4)
                shapes.add(other.shape)
        assert len(shapes) > 3
        assert cache.verify() == []


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_device_decodes_what_the_host_does(place: Path, tmp_path: Path, codec: str) -> None:
    cache_words = [*cached(place)[:-1], tmp_path / "cache", "--codec", codec]
    command(*cache_words)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        names = [f"{i}.png" for i in range(len(SIZES))]
        wanted = [view for name in names for view in cache.get(name).views]
        found = unpack([cache.packed(name) for name in names])
        assert isinstance(found, list) and len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(np.array(one.astype(mx.float32)), other, atol=1e-5)
        alone = unpack([cache.packed("1.png")])
        assert not isinstance(alone, list) and alone.shape == (1, 16, 32)


def test_a_plan_counts_the_tokens_of_each_view(place: Path, tmp_path: Path) -> None:
    words = cached(place)[:-1]
    plan = json.loads(command(*words, tmp_path / "cache", "--codec", "float32", "--plan", "--json"))
    with EmbeddingCache.open(place / "cache") as cache:
        totals = cache.totals()
        assert (plan["pictures"], plan["views"]) == (totals.pictures, totals.views)
        assert abs(plan["bytes"] / totals.bytes - 1) < 0.2
    assert {option["pool"] for option in plan["options"]} == {"none"}
    told = command(*words, tmp_path / "cache", "--pool", "mean2", "--plan", code=1)
    assert "one square grid" in told


@pytest.mark.parametrize(("stage", "packing"), [("pretrain", "pack"), ("lora", "padded")])
def test_training_with_the_cache_equals_training_without(
    place: Path, tmp_path: Path, stage: str, packing: str
) -> None:
    words = [stage, "-m", place / "model", "--data", place / "rows.jsonl", "--iters", 2]
    words += ["--batch-size", 2, "--max-seq-length", 1024, "--seed", 3]
    words += ["--batching", "pack"] if packing == "pack" else []
    losses = {}
    for way in ("--images", "--cache"):
        out = tmp_path / way[2:]
        told = command(*words, way, place / way[2:], "--out", out)
        assert "4 rows" in told and "left out" not in told, told
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        losses[way] = [line["loss"] for line in lines]
        assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    np.testing.assert_allclose(losses["--cache"], losses["--images"], rtol=1e-5)


def test_the_tower_trains_too(place: Path, tmp_path: Path) -> None:
    words = ["sft", "-m", place / "model", "--data", place / "rows.jsonl", "--iters", 2]
    words += ["--images", place / "images", "--batch-size", 4, "--max-seq-length", 1024]
    words += ["--train", "projector,lm,vision", "--grad-checkpoint", "--out", tmp_path / "out"]
    command(*words)
    before, after = mlxvlm.load(place / "model"), mlxvlm.load(tmp_path / "out")
    table = "position_embedding"
    old, new = (np.array(m.vision.embeddings[table].weight) for m in (before, after))
    assert np.abs(new - old).max() > 0


@pytest.mark.parametrize("way", ["--images", "--cache"])
def test_a_plan_is_of_the_views_as_they_are(place: Path, way: str) -> None:
    words = ["plan", "pretrain", "-m", place / "model", "--data", place / "rows.jsonl"]
    words += ["--max-seq-length", 1024, "--batch-size", 4, "--steps", 0, "--json"]
    plan = json.loads(command(*words, way, place / way[2:]))
    assert plan["rows"] == 4 and ("features" in plan["parts"]) == (way == "--cache")
    encoding = plan["parts"].get("encoding", 0) + plan["parts"].get("encoder", 0)
    assert (encoding > 0) == (way == "--images")


def test_chat(place: Path) -> None:
    said = command(
        *("chat", place / "images" / "0.png", place / "images" / "3.png", "-m", place / "model"),
        *("-p", "What is this?", "--max-tokens", 4, "--json"),
    )
    told = json.loads(said)
    pictures = mlxvlm.load(place / "model").look([place / "images" / f"{i}.png" for i in (0, 3)])
    assert sum(len(picture.views) for picture in pictures) > 4
    assert told["prompt_tokens"] > 5 * sum(len(picture.views) for picture in pictures)


def test_an_encoder_of_one_grid_is_built_into_a_model_of_slices(tmp_path: Path) -> None:
    """Llama3-V's blog has it so: a SigLIP, slices of a picture, its positions resized to each."""
    eyes = tiny_vlm()
    save(eyes, tmp_path / "eyes")
    (tmp_path / "language").mkdir()
    raw = {**tiny_config().language, "max_position_embeddings": 4096}
    (tmp_path / "language" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "language" / "tokenizer.json").write_bytes(
        (tmp_path / "eyes" / "tokenizer.json").read_bytes()
    )
    words = ["build", "--vision", tmp_path / "eyes", "--language", tmp_path / "language"]
    words += ["--fresh-language", "--tiling", "slices-uhd", "--projector"]
    told = command(*words, "attention", "--out", tmp_path / "no", code=1)
    assert "choose resampler or spatial_resampler" in told
    told = command(*words, "spatial_resampler", "--num-query-tokens", 4, "--out", tmp_path / "uhd")
    assert "4 visual tokens a view, 1 to 7 tiles a picture, and the whole" in told
    vlm = mlxvlm.load(tmp_path / "uhd")
    assert vlm.config.vision.positions == "bicubic" and vlm.config.prompt.merge == "uhd"
    table = "vision.embeddings.position_embedding.weight"
    own = dict(tree_flatten(vlm.parameters()))[table]
    assert (own == dict(tree_flatten(eyes.parameters()))[table]).all().item()
    image = np.random.default_rng(0).integers(0, 256, (30, 100, 3), dtype=np.uint8)
    reply = vlm.generate([{"role": "user", "content": "What?"}], [image], max_tokens=3)
    assert reply.prompt_tokens > 4 * 4
