"""examples/llava_stages: LLaVA-1.5's two stages, every step of its README; cached = uncached."""

import json
import random
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.llava_stages import compare, rows
from mlxvlm.cli.main import app
from mlxvlm.images.preprocess import crop, pad
from mlxvlm.weights.load import load

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "llava_stages"
STAGES = ("pretrain", "sft")


def commands(folder: Path) -> list[list[str]]:
    """The README's indented commands in `folder` instead of runs/."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|mlxvlm) .*)$", text, re.MULTILINE)
    for old, new in (
        ("runs/llava-stages", folder),
        ("examples/llava_stages/", f"{EXAMPLE}/"),
        ("weights/demo", ROOT / "weights" / "demo"),
    ):
        lines = [line.replace(old, str(new)) for line in lines]
    return [shlex.split(line) for line in lines]


def run(command: list[str], less: list[str]) -> str:
    program, *words = command
    if program == "mlxvlm":
        done = CliRunner().invoke(app, [*words, *less])
        assert done.exit_code == 0, done.output
        return done.output
    told = subprocess.run(
        [sys.executable, *words, *less], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_a_crop_loses_what_only_padding_keeps():
    things = [("red", "circle"), ("blue", "square"), ("green", "triangle")]
    image = rows.draw(things, random.Random(1))
    assert image.size == (288, 96)
    green, red = (np.array(color, int) for color in ((44, 160, 44), (214, 39, 40)))
    for name, view in (
        ("crop", crop(image, 96, "bicubic")),
        ("pad", pad(image, 96, "bicubic", (127, 127, 127))),
    ):
        for color in (red, green):
            near = np.abs(view.astype(int) - color).sum(axis=-1) < 30
            assert near.sum() > 150 if name == "pad" else near.sum() == 0
    assert rows.caption(things) == "a red circle, a blue square and a green triangle"
    asked = compare.asks(rows.chat("a.png", things, random.Random(2)))
    assert sorted(asked)[0] == ("left", "What is on the left?", "A red circle.")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The README's commands up to the caches, of a few pictures."""
    place = tmp_path_factory.mktemp("stages")
    few = {"rows": ["--count", "6", "--held-out", "1"], "cache-embeddings": ["--strict"]}
    for command in commands(place):
        name = command[2].rpartition(".")[2] if command[0] == "python" else command[1]
        if name in ("pretrain", "sft", "plan", "chat", "compare"):
            continue
        run(command, few.get(name, []))
    return place


def test_both_stages_are_the_same_with_and_without_their_caches(place, tmp_path):
    """Trained one after the other, as the README says; each stage's cache serves it alone."""
    told = {}
    for way in ("cached", "uncached"):
        for command in commands(place):
            if command[1] not in STAGES:
                continue
            words = [word.replace(str(place), str(tmp_path / way)) for word in command]
            for flag in ("--data", "--cache"):
                at = words.index(flag) + 1
                words[at] = command[at]
            if words[1] == "pretrain":
                words[words.index("-m") + 1] = str(place / "base")
            if way == "uncached":
                at = words.index("--cache")
                del words[at : at + 2]
            run(words, ["--iters", "3", "--strict", "--batch-size", "2"])
            out = Path(words[words.index("--out") + 1])
            lines = [json.loads(one) for one in (out / "metrics.jsonl").read_text().splitlines()]
            told[way, words[1]] = [line["loss"] for line in lines if "loss" in line]
            config = load(out).config
            wanted = tomllib.loads((EXAMPLE / f"{words[1]}.toml").read_text(encoding="utf-8"))
            assert config.tiling.resize == wanted["resize"] == ("crop", "pad")[words[1] == "sft"]
            assert config.prompt.layout == wanted["layout"]
    for stage in STAGES:
        assert len(set(told["cached", stage])) == 3
        np.testing.assert_allclose(told["cached", stage], told["uncached", stage], rtol=1e-4)
    model = str(tmp_path / "cached" / "sft")
    compared = run(
        ["python", "-m", "examples.llava_stages.compare", str(place)], ["--model", model]
    )
    assert [line.split()[0] for line in compared.splitlines()] == list(rows.PLACES)
    assert all(line.endswith("of 1") for line in compared.splitlines())


def test_a_plan_says_that_each_stage_needs_its_own_cache(place):
    (words,) = [words for words in commands(place) if words[:2] == ["mlxvlm", "plan"]]
    words[words.index("-m") + 1] = str(place / "base")
    said = " ".join(run(words, ["--steps", "0"]).split())
    assert "resized by 'pad' in this stage" in said
    assert "cache-embeddings --resize pad" in said and "one of 'squash' is refused" in said
    cached = json.loads(run([*words, "--cache", str(place / "padded")], ["--steps", "0", "--json"]))
    assert cached["resized"] is None
    done = CliRunner().invoke(app, [*words[1:], "--cache", str(place / "cropped"), "--steps", "0"])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert 'tiling.resize ("crop" in the cache, "pad" here)' in said
    assert "need a cache each: mlxvlm cache-embeddings --resize pad" in said
