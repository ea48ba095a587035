"""Each projector from build to chat: built, cached, trained, saved, planned, asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import picture, tiny_config, tiny_vlm
from typer.testing import CliRunner, Result

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cli.main import app
from mlxvlm.errors import CacheError
from mlxvlm.machine.remedies import _levers
from mlxvlm.machine.study import Study
from mlxvlm.train.stages import stage_config
from mlxvlm.weights.load import load, load_projected
from mlxvlm.weights.save import save

# Flags of `build`, visual tokens a view (of a grid of 4 x 4), and tokens that a cache holds of one.
CHOICES = {
    "c_abstractor": (["--num-query-tokens", 9, "--projector-width", 24], 9, 16),
    "resampler": (["--num-query-tokens", 6, "--projector-heads", 2], 6, 16),
    "resampler mean2": (["--num-query-tokens", 3], 3, 4),
    "mlp concat2": ([], 4, 16),
}


def command(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def right(*args: object) -> Result:
    done = command(*args)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, a language model, three pictures and a row about each."""
    place = tmp_path_factory.mktemp("projectors")
    save(tiny_vlm(), place / "eyes")
    (place / "lm").mkdir()
    (place / "lm" / "config.json").write_text(json.dumps(tiny_config().language))
    (place / "lm" / "tokenizer.json").write_bytes((place / "eyes" / "tokenizer.json").read_bytes())
    (place / "images").mkdir()
    rows = []
    for i, text in enumerate(("red", "blue", "a long one")):
        Image.fromarray(picture(i)).save(place / "images" / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "text": text}))
    (place / "rows.jsonl").write_text("\n".join(rows))
    return place


def build(place: Path, choice: str, *more: object) -> Result:
    kind, *pool = choice.split()
    words = ["build", "--vision", place / "eyes", "--language", place / "lm", "--fresh-language"]
    words += ["--projector", kind, *(["--pool", *pool] if pool else [])]
    return command(*words, *more)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("choice", CHOICES)
def test_from_build_to_chat(place, tmp_path, choice):
    flags, tokens, cached = CHOICES[choice]
    base, aligned, tuned = (tmp_path / name for name in ("base", "aligned", "tuned"))
    done = build(place, choice, *flags, "--out", base)
    assert done.exit_code == 0 and f"{tokens} visual tokens a view" in done.stdout, done.output

    words = ["cache-embeddings", place / "images", "--codec", "float32", "-m"]
    right(*words, base, "--out", tmp_path / "cache")
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert cache[next(cache.names())].views[0].shape == (cached, 32)

    data = ["--data", place / "rows.jsonl", "--batch-size", 2, "--iters", 2, "--seed", 1]
    images = ["--images", place / "images"]
    train = ["pretrain", "-m", base, *data]
    right(*train, "--cache", tmp_path / "cache", "--out", aligned)
    right(*train, *images, "--out", tmp_path / "uncached")
    np.testing.assert_allclose(losses(aligned), losses(tmp_path / "uncached"), rtol=1e-5)
    before, after = (dict(tree_flatten(load(f).projector.parameters())) for f in (base, aligned))
    still = [name for name in before if mx.array_equal(before[name], after[name])]
    assert before.keys() == after.keys() and not still

    right(*words, aligned, "--at", "projector", "--out", tmp_path / "seen")
    with EmbeddingCache.open(tmp_path / "seen") as cache:
        assert cache[next(cache.names())].views[0].shape == (tokens, 64)
    train = ["sft", "--train", "lm", "-m", aligned, *data]
    right(*train, "--cache", tmp_path / "seen", "--out", tuned)
    right(*train, *images, "--out", tmp_path / "tuned uncached")
    np.testing.assert_allclose(losses(tuned), losses(tmp_path / "tuned uncached"), rtol=1e-5)

    plan = ["plan", "pretrain", "-m", base, *data[:4], *images, "--out", tmp_path / "x"]
    told = json.loads(right(*plan, "--memory", "16GB", "--steps", 0, "--json").stdout)
    assert told["fits"] is True
    flags = {"model": base, "data": place / "rows.jsonl", "images": place / "images", "out": "x"}
    study = Study(stage_config("pretrain", {name: str(flag) for name, flag in flags.items()}))
    assert study.step().weights["projector"] == sum(v.nbytes for v in before.values())
    # No pooling in front changes how many tokens these give, so none is a way to save memory.
    assert not any("--pool" in lever.flag(study.base) for lever in _levers(study))
    image, ask = place / "images" / "0.png", ["-p", "What?", "--max-tokens", 3, "--json"]
    reply = json.loads(right("chat", image, "-m", tuned, *ask).stdout)
    blind = json.loads(right("chat", "-m", tuned, *ask).stdout)
    assert reply["prompt_tokens"] - blind["prompt_tokens"] == tokens + 1  # and a line break


def test_a_cache_behind_one_projector_is_not_anothers(place, tmp_path):
    """How many tokens an abstractor pools to, and a resampler's heads, are in no tensor."""
    pairs = {
        "c_abstractor": [("--num-query-tokens", 4), ("--num-query-tokens", 9)],
        "resampler": [("--projector-heads", 1), ("--projector-heads", 2)],
    }
    for kind, ways in pairs.items():
        folders = [tmp_path / f"{kind} {number}" for number in range(2)]
        for folder, way in zip(folders, ways, strict=True):
            more = ("--projector-width", 16)
            assert build(place, kind, *way, *more, "--out", folder).exit_code == 0
        one, other = (load_projected(folder).identity() for folder in folders)
        assert one["projector"] == other["projector"] and one != other
        right(
            *("cache-embeddings", place / "images", "--codec", "float32", "--at", "projector"),
            *("-m", folders[0], "--out", tmp_path / f"{kind} cache"),
        )
        with EmbeddingCache.open(tmp_path / f"{kind} cache") as cache:
            cache.require(one)
            with pytest.raises(CacheError, match=r"projector\.num_"):
                cache.require(other)


@pytest.mark.parametrize(
    ("kind", "flags", "told"),
    [
        ("c_abstractor", ["--num-query-tokens", 10], "must be a square number .* 9 or 16"),
        ("c_abstractor", [], r"num_query_tokens \(=144\) must be at most 16"),
        ("c_abstractor", ["--projector-heads", 2], "--projector-heads belongs to --projector att"),
        ("resampler", ["--projector-layers", 2], "--projector-layers belongs to --projector att"),
        ("resampler", ["--projector-heads", 3], r"width \(=64\) must be divisible by .*heads \(=3"),
        ("resampler", ["--num-positions", 16], "--num-positions belongs to --projector attention"),
        (
            "mlp",
            ["--num-query-tokens", 9],
            "--num-query-tokens belongs to --projector c_abstractor",
        ),
    ],
)
def test_what_build_refuses(place, tmp_path, kind, flags, told):
    done = build(place, kind, *flags, "--out", tmp_path / "out")
    words = " ".join(done.stderr.split())
    assert done.exit_code and re.search(told, words), done.output
    assert not (tmp_path / "out").exists() and "Traceback" not in done.output
