"""One picture in rows of one and of three, through the commands: build, cache, train, prune."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import tiny_config, tiny_vlm
from typer.testing import CliRunner, Result

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import plan_of
from mlxvlm.cli.main import app
from mlxvlm.config import TilingConfig
from mlxvlm.weights.save import save


def command(*args: object) -> Result:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dynamic tiles, four pictures, and rows of one, two and three of them."""
    place = tmp_path_factory.mktemp("tiling")
    save(tiny_vlm(tiny_config(tiling=TilingConfig("dynamic", 32, max_tiles=6))), place / "model")
    (place / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(((200, 30), (30, 30), (90, 60), (40, 250))):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")

    def row(*images: int, text: str) -> dict[str, Any]:
        return {
            "images": [f"{i}.png" for i in images],
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": text},
            ],
        }

    rows = [row(0, text="one"), row(0, 1, 2, text="three"), row(2, 0, text="two"), row(1, text="a")]
    (place / "rows.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    command(*words, "-m", place / "model", "--out", place / "cache", "--codec", "float32")
    return place


# The pictures under their plans: 0 alone, 1 and 2 in three, 1 in one, 0 and 2 in two and in three.
JOBS = {("0.png", 1), ("0.png", 2), ("0.png", 3), ("1.png", 1)} | {
    ("1.png", 3),
    ("2.png", 2),
    ("2.png", 3),
}


def limit(among: int) -> int | None:
    return None if among == 1 else 6 // among


def test_each_row_finds_its_tiles(place):
    vlm = tiny_vlm(tiny_config(tiling=TilingConfig("dynamic", 32, max_tiles=6)))
    with EmbeddingCache.open(place / "cache") as cache:
        totals = cache.totals()
        assert (totals.pictures, totals.tilings, totals.names) == (3, len(JOBS), 3)
        views = 0
        for name, among in JOBS:
            pictures = vlm.look([place / "images" / name], limit(among))
            (want,) = vlm.features(pictures)
            got = cache.get(name, plan_of(limit(among)))
            assert got.grid == want.grid
            views += len(got.views)
            for one, other in zip(want.views, got.views, strict=True):
                np.testing.assert_allclose(np.array(one), other, atol=1e-4)
        assert totals.views == views
        assert (
            len(cache.get("0.png").views) == 7 and len(cache.get("0.png", "max-tiles-2").views) == 3
        )
    done = command("cache", "info", place / "cache")
    assert "3 pictures under 3 names, 7 tilings of them, " in done.stdout


def test_a_plan_counts_each_tiling(place, tmp_path):
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    words += ["-m", place / "model", "--codec", "float32", "--out"]
    done = command(*words, tmp_path / "cache", "--plan")
    assert re.search(r"pictures +7\n +5 of them in fewer tiles", done.stdout)
    plan = json.loads(command(*words, tmp_path / "cache", "--plan", "--json").stdout)
    with EmbeddingCache.open(place / "cache") as cache:
        assert (plan["pictures"], plan["limited"]) == (7, 5)
        assert plan["views"] == cache.totals().views
    again = command(*words, place / "cache", "--json")
    summary = json.loads(again.stdout)
    assert (summary["pictures"], summary["known"], summary["encoded"]) == (7, 7, 0)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_training_with_the_cache_equals_training_without(place, tmp_path, stage):
    words = [stage, "-m", place / "model", "--data", place / "rows.jsonl", "--iters", 6]
    words += ["--batch-size", 2, "--max-seq-length", 1024, "--seed", 3]
    losses = {}
    for way in ("--images", "--cache"):
        out = tmp_path / way[2:]
        where = place / way[2:]
        done = command(*words, way, where, "--out", out)
        assert "4 rows" in done.stderr and "left out" not in done.stderr, done.stderr
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses[way] = [json.loads(line)["loss"] for line in lines]
        tokens = [json.loads(line)["tokens"] for line in lines]
        assert len(lines) == 6 and all(tokens)
    np.testing.assert_allclose(losses["--cache"], losses["--images"], rtol=1e-5)
    assert len(set(losses["--cache"])) == 6


def test_a_row_whose_plan_is_not_cached_is_left_out_by_name(place, tmp_path):
    rows = (place / "rows.jsonl").read_text().splitlines()
    four = json.loads(rows[1]) | {"images": ["0.png", "1.png", "2.png", "0.png"]}
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps(four)]))
    done = command(
        *("pretrain", "-m", place / "model", "--data", tmp_path / "rows.jsonl", "--iters", 1),
        *("--cache", place / "cache", "--out", tmp_path / "out"),
    )
    assert "rows.jsonl:5: 0.png is in the cache" in done.stderr
    assert "how many pictures are in its row" in done.stderr


def test_prune_keeps_what_rows_need(place, tmp_path):
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    words += ["-m", place / "model", "--codec", "float32", "--out", tmp_path / "cache"]
    command(*words)
    rows = (place / "rows.jsonl").read_text().splitlines()
    (tmp_path / "keep.jsonl").write_text(rows[1])
    done = command("cache", "prune", tmp_path / "cache", "--keep", tmp_path / "keep.jsonl")
    assert "4 pictures dropped and 3 kept" in done.stdout
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert cache.verify() == [] and cache.totals().tilings == 3
        assert len(cache.get("0.png", "max-tiles-2").views) == 3
    summary = json.loads(command(*words, "--json").stdout)
    assert (summary["known"], summary["encoded"]) == (3, 4)


def test_a_source_with_fewer_tiles_finds_them(place: Path, tmp_path: Path) -> None:
    """--max-tiles caches what a recipe's max_tiles asks for, and prune keeps it."""
    cache = tmp_path / "cache"
    words = [place / "rows.jsonl", "--images", place / "images"]
    made = [*words, "-m", place / "model", "--out", cache, "--codec", "float32"]
    command("cache-embeddings", *made, "--max-tiles", 3)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        model = "{place / "model"}"
        iters = 2
        [[sources]]
        data = "{place / "rows.jsonl"}"
        images = "{place / "images"}"
        cache = "{cache}"
        max_tiles = 3
        """
    )
    command("pretrain", "--config", recipe, "--out", tmp_path / "cached", "--strict")
    recipe.write_text(re.sub("cache = .*", "", recipe.read_text()))
    command("pretrain", "--config", recipe, "--out", tmp_path / "plain", "--strict")
    cached, plain = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("cached", "plain")
    )
    np.testing.assert_allclose(cached, plain, rtol=1e-5)
    command("cache", "prune", cache, "--keep", *words, "--max-tiles", 3)
    with EmbeddingCache.open(cache) as found:
        plans = {found.cut("0.png", plan_of(limit)).views for limit in (3, 1)}
    assert len(plans) == 2
