"""Each published system through the commands, at tiny size: what README's table says that it does.

A system's folder is in the layout of those who publish it, or, where nobody does, what `build`
makes. A cell of the table is a test of this file: `test_chats[internvl-2.5]`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read, write
from eve_folders import write_eve, write_teacher
from internvl_folders import write_internvl
from llava_exports import parts, whole
from minicpm_folders import write_minicpm
from mlx.utils import tree_flatten
from PIL import Image
from test_llava_hd import build as build_hd
from tiny_mm15 import mm15
from tiny_vlm import tiny_vlm
from typer.testing import CliRunner
from uhd_folders import write_uhd

import mlxvlm
from mlxvlm.cli.main import app
from mlxvlm.weights.save import save

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((60, 40), (30, 30), (28, 90))  # of the pictures
LENGTH = 2048


def _mm15(folder: Path) -> Path:
    save(mm15(), folder / "model")
    return folder / "model"


def _llama3v(folder: Path) -> Path:
    save(tiny_vlm(), folder / "model")
    return folder / "model"


def _llava_next(folder: Path) -> Path:
    raw, projector = parts(folder)
    pinpoints = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
    raw |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
    raw["mm_patch_merge_type"] = "spatial_unpad"
    newline = {"model.image_newline": mx.linspace(-1, 1, raw["hidden_size"])}
    return write(folder / "model", raw, read(folder / "language")[1] | projector | newline)


def _eve(folder: Path) -> Path:
    teacher = write_teacher(folder / "teacher")
    return write_eve(folder / "model", mm_vision_tower_clip=str(teacher))


SYSTEMS: dict[str, Callable[[Path], Path]] = {
    "llama3-v": _llama3v,
    "minicpm-llama3-v-2.5": write_minicpm,
    "llava-1.5": whole,
    "llava-1.5-hd": build_hd,
    "llava-next": _llava_next,
    "internvl-2.5": write_internvl,
    "llava-uhd": write_uhd,
    "eve-7b": _eve,
    "mm1.5": _mm15,
}


class Place:
    """A system's folder, and pictures and rows beside it. frozen: whether it has an encoder."""

    def __init__(self, folder: Path, write: Callable[[Path], Path]):
        self.folder, self.frozen = folder, write is not _eve
        self.model = write(folder / "model")
        self.images, self.rows = folder / "images", folder / "rows.jsonl"
        self.images.mkdir()
        rng = np.random.default_rng(0)
        for i, size in enumerate(SIZES):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{i}.png")

        def row(answer: str, *images: int) -> str:
            turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
            return json.dumps({"images": [f"{i}.png" for i in images], "messages": turns})

        rows = [row("One.", 0), row("Two.", 1, 2), row("Three.", 2), row("None.")]
        self.rows.write_text("\n".join(rows))

    def ask(self, *flags: object) -> dict[str, Any]:
        pictures = [self.images / f"{i}.png" for i in (0, 2)]
        words = ["chat", *pictures, "-m", self.model, "-p", "What is this?", "--max-tokens", 6]
        return json.loads(command(*words, "--json", *flags))

    def cache(self) -> Path:
        out = self.folder / "cache"
        words = ["cache-embeddings", self.rows, "-m", self.model, "--images", self.images]
        command(*words, "--out", out, "--codec", "float32")
        return out

    def train(self, stage: str, *flags: object) -> tuple[Path, list[float]]:
        """The result's folder, and the losses of two steps."""
        out = self.folder / "-".join(map(str, [stage, len(list(self.folder.iterdir()))]))
        words = [stage, "-m", self.model, "--data", self.rows, "--iters", 2, "--batch-size", 2]
        words += ["--max-seq-length", LENGTH, "--seed", 3, "--out", out]
        told = command(*words, *flags)
        assert "4 rows" in told, told
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
        return out, losses


def command(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    made: dict[str, Place] = {}

    def place(name: str) -> Place:
        if name not in made:
            made[name] = Place(tmp_path_factory.mktemp(name), SYSTEMS[name])
        return made[name]

    return place


@pytest.fixture(params=list(SYSTEMS))
def place(request: pytest.FixtureRequest, places: Callable[[str], Place]) -> Place:
    return places(request.param)


def parameters(folder: Path) -> dict[str, np.ndarray]:
    found = tree_flatten(mlxvlm.load(folder, dtype="float32").parameters())
    return {name: np.array(value) for name, value in found}


def changed(before: Path, after: Path) -> set[str]:
    """Parts of the model in which any number is another."""
    old, new = parameters(before), parameters(after)
    assert old.keys() == new.keys()
    return {name.split(".")[0] for name in old if not np.array_equal(old[name], new[name])}


def test_loads(place: Place) -> None:
    """Also in our own layout, into which `convert` brings it without a loss."""
    command("convert", "-m", place.model, "--out", place.folder / "ours")
    pictures = [place.images / f"{i}.png" for i in (0, 2)]
    asked = [{"role": "user", "content": "What is this?"}]
    logits = []
    for folder in (place.model, place.folder / "ours"):
        vlm = mlxvlm.load(folder, dtype="float32")
        prompt = vlm.tokenize(asked, pictures)
        found = vlm(mx.array(prompt.tokens)[None], prompt.pictures)
        assert found.shape[1] == len(prompt.tokens)
        logits.append(np.array(found))
    assert np.isfinite(logits[0]).all() and logits[0].std() > 0
    np.testing.assert_array_equal(*logits)


def test_chats(place: Place) -> None:
    """About two pictures, each of which matters."""
    said = place.ask()
    assert said["generation_tokens"] > 0 and said["images"] == [
        str(place.images / f"{i}.png") for i in (0, 2)
    ]
    vlm = mlxvlm.load(place.model, dtype="float32")
    asked = [{"role": "user", "content": "What is this?"}]
    last = []
    for images in ((0, 2), (1, 2), (0, 1)):
        prompt = vlm.tokenize(asked, [place.images / f"{i}.png" for i in images])
        last.append(np.array(vlm(mx.array(prompt.tokens)[None], prompt.pictures)[0, -1]))
    assert np.abs(last[0] - last[1]).max() > 1e-4 and np.abs(last[0] - last[2]).max() > 1e-4


def test_caches(place: Place) -> None:
    """An answer, and a step's loss, from the cache are those from the pictures."""
    cache = place.cache()
    _, fresh = place.train("pretrain", "--images", place.images)
    if place.frozen:
        assert place.ask("--cache", cache)["text"] == place.ask()["text"]
        _, kept = place.train("pretrain", "--cache", cache)
    else:  # the teacher's features
        _, kept = place.train("pretrain", "--images", place.images, "--teacher-cache", cache)
    np.testing.assert_allclose(kept, fresh, rtol=1e-5)


def test_pretrains(place: Place) -> None:
    out, _ = place.train("pretrain", "--images", place.images)
    assert changed(place.model, out) == {"projector"}


def test_sfts(place: Place) -> None:
    out, _ = place.train("sft", "--images", place.images)
    assert changed(place.model, out) == {"projector", "language"}


def test_loras(place: Place) -> None:
    """The adapters are written alone, and go with the model that they were trained on."""
    out, _ = place.train("lora", "--images", place.images)
    vlm = mlxvlm.load(place.model, adapter=out, dtype="float32")
    found: dict[str, mx.array] = dict(tree_flatten(vlm.parameters()))
    adapters = [value for name, value in found.items() if name.endswith("lora_b")]
    assert adapters and max(mx.abs(value).max().item() for value in adapters) > 0
    assert place.ask("--adapter-path", out)["generation_tokens"] > 0


def test_the_readme_names_these_tests() -> None:
    """Its table has a line for each system, and a mark for each of these tests that runs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\| system \|.*?\n\n", readme, re.DOTALL)
    assert table, "README.md has a table of systems."
    head, _, *lines = table[0].strip().splitlines()
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    columns = [cell.strip().lower() for cell in head.split("|")[3:-1]]
    assert len(columns) == 6 and set(columns) < tests
    assert {line.split("`")[1] for line in lines} == set(SYSTEMS)
    for line in lines:
        assert [cell.strip() for cell in line.split("|")[-7:-1]] == ["✓"] * 6
