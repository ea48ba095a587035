"""LLaVA-1.5-HD, of which there is a paper and no code: built, trained, and against float64.

The reference is written from the paper's words and LLaVA-NeXT's conventions (any-resolution grids
of at most six tiles, padding left out, a row's end after each row, the whole picture first), with
CLIP's tower and the projector in numpy, and shares nothing with what it checks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write
from llava_exports import parts
from mlx.utils import tree_flatten
from PIL import Image
from test_xtuner import CLIP, LAYERS, WIDTH, clip_tower, command

from mlxvlm.images.picture import Cut
from mlxvlm.merge import visual_tokens
from mlxvlm.weights.families.towers import CLIP_MEAN, CLIP_STD
from mlxvlm.weights.load import load

SIDE, PATCH, GRID, HEADS = 16, 4, 4, 2
# (width, height)
SIZES = [(16, 16), (32, 32), (40, 30), (30, 40), (120, 21), (21, 120), (7, 90), (1, 1), (300, 2)]
Weights = dict[str, np.ndarray]


def drawing(size: tuple[int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


# The reference


def norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    off = x - x.mean(-1, keepdims=True)
    scaled = off / np.sqrt((off**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def tower(view: np.ndarray, w: Weights) -> np.ndarray:
    """uint8 [16, 16, 3] -> [16, 32]: the last block but one of CLIP, without the class token."""
    x = (view / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    patches = [
        np.einsum("yxc,dcyx->d", x[r : r + PATCH, c : c + PATCH], w["embeddings.patches"])
        for r in range(0, SIDE, PATCH)
        for c in range(0, SIDE, PATCH)
    ]
    x = np.stack([w["embeddings.class_embedding"], *patches])
    x = norm(x + w["embeddings.position_embedding.weight"], w, "pre_layrnorm")
    for i in range(LAYERS - 1):
        layer = f"encoder.layers.{i}."
        y = norm(x, w, layer + "layer_norm1")
        q, k, v = (linear(y, w, f"{layer}self_attn.{n}_proj") for n in "qkv")
        heads = []
        for h in range(HEADS):
            mine = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            scores = q[:, mine] @ k[:, mine].T / math.sqrt(WIDTH / HEADS)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, mine])
        x = x + linear(np.concatenate(heads, -1), w, layer + "self_attn.out_proj")
        y = linear(norm(x, w, layer + "layer_norm2"), w, layer + "mlp.fc1")
        x = x + linear(y / (1 + np.exp(-1.702 * y)), w, layer + "mlp.fc2")
    return x[1:]


def projector(x: np.ndarray, w: Weights) -> np.ndarray:
    y = linear(x, w, "linear_1")
    gelu = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    return linear(gelu, w, "linear_2")


def canvas_of(width: int, height: int) -> tuple[int, int]:
    """Columns and rows: most of the picture's pixels, then least waste."""
    grids = [(a, b) for a in range(1, 7) for b in range(1, 7) if a * b <= 6]

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        a, b = grid[0] * SIDE, grid[1] * SIDE
        scale = min(a / width, b / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, a * b - kept

    return min(grids, key=rank)


def sequence(image: Image.Image, eyes: Weights, words: Weights) -> np.ndarray:
    """[visual tokens, 32] of a picture."""

    def seen(part: Image.Image) -> np.ndarray:
        return projector(tower(np.asarray(part), eyes), words).reshape(GRID, GRID, -1)

    (width, height), (columns, rows) = image.size, canvas_of(*image.size)
    across, down = columns * SIDE, rows * SIDE
    if across / width < down / height:
        inner = across, min(math.ceil(height * across / width), down)
    else:
        inner = min(math.ceil(width * down / height), across), down
    canvas = Image.new("RGB", (across, down))
    corner = (across - inner[0]) // 2, (down - inner[1]) // 2
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
    lines = np.zeros((rows * GRID, columns * GRID, words["linear_2.bias"].size))
    for r in range(rows):
        for c in range(columns):
            box = (c * SIDE, r * SIDE, (c + 1) * SIDE, (r + 1) * SIDE)
            lines[r * GRID : (r + 1) * GRID, c * GRID : (c + 1) * GRID] = seen(canvas.crop(box))
    if width / height > columns / rows:
        kept = int(round(height * (columns * GRID / width), 7))
        spare = (rows * GRID - kept) // 2
        lines = lines[spare : rows * GRID - spare]
    else:
        kept = int(round(width * (rows * GRID / height), 7))
        spare = (columns * GRID - kept) // 2
        lines = lines[:, spare : columns * GRID - spare]
    found = list(seen(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).reshape(16, -1))
    for line in lines:
        found += [*line, words["image_newline"]]
    return np.stack(found)


def plain(tensors: dict[str, Any]) -> Weights:
    return {name: np.array(value, np.float64) for name, value in tensors.items()}


def trained(folder: Path) -> tuple[Any, Weights]:
    vlm = load(folder)
    return vlm, plain(dict(tree_flatten(vlm.projector.parameters())))


def build(place: Path) -> Path:
    """A CLIP tower and a language model, and the LLaVA-1.5-HD built of them."""
    parts(place)
    tensors = clip_tower()
    rng = np.random.default_rng(9)
    positions = rng.standard_normal((GRID**2 + 1, WIDTH), np.float32)
    tensors["vision_model.embeddings.position_embedding.weight"] = mx.array(positions)
    write(place / "clip", {**CLIP, "image_size": SIDE}, tensors)
    words = ["build", "--vision", place / "clip", "--language", place / "language"]
    words += ["--projector", "mlp", "--tiling", "anyres-hd", "--out", place / "model"]
    said = command(*words)
    assert "16 visual tokens a view, 1 to 6 tiles a picture, and the whole" in said
    return place / "model"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures and rows."""
    place = tmp_path_factory.mktemp("hd")
    build(place)
    (place / "images").mkdir()
    for i, size in enumerate(SIZES):
        drawing(size, i).save(place / "images" / f"{i}.png")

    def row(*images: int, text: str) -> str:
        asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
        return json.dumps({"images": [f"{i}.png" for i in images], "messages": asked})

    rows = [row(2, text="one"), row(3, 4, text="two"), row(0, text="three"), row(text="none")]
    rows += [row(5, 8, 7, text="the circle"), row(6, text="a red one")]
    (place / "rows.jsonl").write_text("\n".join(rows))
    return place


def eyes(place: Path) -> Weights:
    stored: Any = mx.load(str(place / "clip" / "model.safetensors"))
    found = plain({name.removeprefix("vision_model."): v for name, v in stored.items()})
    found["embeddings.patches"] = found.pop("embeddings.patch_embedding.weight")
    return found


def check(place: Path, folder: Path) -> None:
    vlm, words = trained(folder)
    for i, size in enumerate(SIZES):
        image = drawing(size, i)
        (seen,) = vlm.look([image])
        wanted = sequence(image, eyes(place), words)
        found = np.array(vlm.project([seen]))
        assert found.shape == wanted.shape
        assert visual_tokens(vlm.config, Cut(len(seen.views), seen.grid, size)) == len(wanted)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def train(place: Path, out: Path, *more: object) -> list[float]:
    words = ["sft", "-m", place / "model", "--data", place / "rows.jsonl", "--iters", 4]
    words += ["--batch-size", 2, "--strict", "--train", "projector,lm", "--out", out, *more]
    command(*words)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_merged_sequence_is_the_references(place: Path) -> None:
    check(place, place / "model")
    _, words = trained(place / "model")
    assert np.abs(words["image_newline"]).max() > 1e-3  # drawn, so that its place shows


def test_it_trains_from_pictures_and_from_a_cache_alike(place: Path, tmp_path: Path) -> None:
    cache = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    cache += ["-m", place / "model", "--codec", "float32", "--out", tmp_path / "cache"]
    command(*cache)
    ours = train(place, tmp_path / "a", "--images", place / "images")
    theirs = train(place, tmp_path / "b", "--cache", tmp_path / "cache")
    assert len(set(ours)) == 4
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    before, after = (trained(folder)[1] for folder in (place / "model", tmp_path / "a"))
    assert all(np.abs(before[name] - after[name]).max() > 1e-6 for name in before)
    check(place, tmp_path / "a")


def test_answers_together_are_answers_alone(place: Path) -> None:
    """Of no picture, of one, and of several that are cut otherwise."""
    vlm = load(place / "model")
    asked = [(2,), (), (4, 0, 8), (5,), (3, 1)]
    rows = [
        ([{"role": "user", "content": f"What is {i}?"}], [drawing(SIZES[n], n) for n in shown])
        for i, shown in enumerate(asked)
    ]
    alone = [vlm.generate(*row, max_tokens=6).tokens for row in rows]
    together = dict(vlm.batch(rows, batch_size=3, max_tokens=6))
    assert [together[i].tokens for i in range(len(rows))] == alone
    assert len({tuple(tokens) for tokens in alone}) > 2


def test_llava_1_5s_recipes_train_it(place: Path, tmp_path: Path) -> None:
    """With one flag, because tiles are neither cropped nor padded."""
    recipes = Path(__file__).resolve().parents[1] / "examples" / "recipes"
    recipe = recipes / "llava-1.5" / "pretrain.toml"
    assert "--tiling anyres-hd" in (recipes / "README.md").read_text()
    words = ["pretrain", "--config", recipe, "-m", place / "model", "--iters", 1]
    words += ["--data", place / "rows.jsonl", "--images", place / "images"]
    words += ["--batch-size", 2, "--grad-accumulation-steps", 1, "--out", tmp_path / "out"]
    said = command(*words, code=1)
    assert "tiling.resize (='crop') must be 'squash' for anyres tiles" in said
    command(*words, "--resize", "squash")
    assert load(tmp_path / "out").config.tiling == load(place / "model").config.tiling
