"""EVE in training: its aligning loss in float64, a teacher cached or not, stages that go on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from eve_folders import HEADS, LAYERS, TEACHER, TEXT, write_eve, write_teacher
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import picture, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cache import EmbeddingCache
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig
from mlxvlm.data.buckets import Batch
from mlxvlm.errors import CacheError, ConfigError, UsageError
from mlxvlm.images.picture import Cut
from mlxvlm.language.forward import hidden_states
from mlxvlm.train.align import Lesson, PatchAligner, places
from mlxvlm.train.loop import Trainer
from mlxvlm.train.losses import batch_loss, count
from mlxvlm.train.stages import stage_config
from mlxvlm.train.teacher import load_teacher
from mlxvlm.weights.save import save


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eve")
    teacher = write_teacher(folder / "teacher")
    write_eve(folder / "model", mm_vision_tower_clip=str(teacher))
    (folder / "images").mkdir()
    rows = []
    for i in range(3):
        pixels = picture(i, 60)[: 4 + i] if i % 2 else picture(i, 60)[:, : 5 + i]
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "red " * (1 + i)})
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is."}]
    rows.append({"messages": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(place: Path, out: Path, stage: str = "pretrain", **flags):
    names = {"model": "model", "data": "rows.jsonl", "images": "images"}
    given = {name: str(place / value) for name, value in names.items()}
    given |= {"out": str(out), "train": "projector,vision", "learning_rate": 1e-3}
    given |= {"iters": 4, "batch_size": 2, "save_every": 0, "warmup": 0.0}
    return stage_config(stage, given | flags)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(place: Path, out: Path, *args, **flags) -> Trainer:
    trainer = Trainer(config(place, out, *args, **flags))
    trainer.run()
    return trainer


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean()
    return x / np.sqrt((x * x).mean() + 1e-5) * weight + bias


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_aligning_loss_follows_the_formulas(place, tmp_path, ratio):
    """One token after the other: hidden states -> prediction -> cosine, for pictures of two shapes
    in one batch."""
    source = write_eve(tmp_path / "model", ratio, mm_vision_tower_clip=str(place / "teacher"))
    vlm = mlxvlm.load(source)
    mx.random.seed(2)
    vlm.aligner = PatchAligner(TEXT, TEACHER, LAYERS)
    for norm, _ in vlm.aligner.norm_layer:
        norm.weight, norm.bias = mx.random.normal((TEXT,)), mx.random.normal((TEXT,))
    p = {n: np.array(v, np.float64) for n, v in tree_flatten(vlm.aligner.parameters())}
    images = [picture(1, 60)[:6], picture(2, 60)[:, :8]]
    teacher = load_teacher(vlm.config.vision, vlm.config.tiling)
    taught = [found.array for found in teacher.encode(teacher.look(images))]
    features = mx.concatenate(taught)
    prompts = [
        vlm.tokenize(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}], [image]
        )
        for image in images
    ]
    length = max(map(len, prompts)) + 3
    tokens = np.stack([np.pad(one.tokens, (0, length - len(one))) for one in prompts])
    pictures = [one.pictures[0] for one in prompts]
    cuts = [one.cut for one in pictures]
    at = np.flatnonzero(prompts[0].supervised[1:])
    empty = np.ones(len(at), np.float32)
    batch = Batch(None, tokens, ["a", "b"], cuts, at, tokens[0][at + 1], empty)
    pixels = vlm.encoder.pixels(pictures)
    totals = count([batch]) | {"teacher": 2.0}
    total, parts = batch_loss(vlm, batch, pixels, {}, totals, lesson=Lesson(features, 0.5))

    visual = vlm.project_views(vlm.encoder.run_all(pixels), cuts)
    last, seen = hidden_states(vlm.language, vlm.splice(tokens, visual), None, (0, 1, 2, 3))
    states = [np.array(seen[k], np.float64) for k in range(4)] + [np.array(last, np.float64)]
    wanted = []
    for number, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True)):
        (h, w), start = cut.grid, prompt.slots[0][0]
        cosines = []
        for i in range(h // ratio):
            for j in range(w // ratio):
                own = [
                    start + 1 + (ratio * i + y) * (w + 1) + ratio * j + x
                    for y in range(ratio)
                    for x in range(ratio)
                ]
                mine = [states[k][number, own].mean(0) for k in (4, 3, 2, 1, 0)]
                each = [
                    p[f"norm_layer.{k}.1.weight"]
                    @ layer_norm(x, p[f"norm_layer.{k}.0.weight"], p[f"norm_layer.{k}.0.bias"])
                    for k, x in enumerate(mine)
                ]
                width, out = TEACHER // HEADS, []
                for head in range(HEADS):
                    part = slice(head * width, (head + 1) * width)
                    scores = np.array([each[0][part] @ one[part] for one in each[1:]])
                    shares = np.exp(scores / math.sqrt(TEACHER))
                    shares /= shares.sum()
                    out.append(sum(s * one[part] for s, one in zip(shares, each[1:], strict=True)))
                found = p["input_layer.weight"] @ mine[0] + p["input_layer.bias"]
                found += p["output_layer.weight"] @ np.concatenate(out) + p["output_layer.bias"]
                top, left = (24 - h // ratio) // 2 + i, (24 - w // ratio) // 2 + j
                theirs = np.array(taught[number][0, 24 * top + left], np.float64)
                cosines.append(found @ theirs / np.linalg.norm(found) / np.linalg.norm(theirs))
        wanted.append(1 - np.mean(cosines))
    assert abs(parts["teacher"].item() - np.mean(wanted)) < 1e-5 and np.std(wanted) > 1e-3
    words = parts["loss"].item() * totals["loss"]
    assert abs(total.item() - words - totals["loss"] * 0.5 * np.mean(wanted)) < 1e-3


def test_layers_are_every_fourth_of_32():
    assert PatchAligner(8, 8, 32).layers == (32, 28, 24, 20, 16, 12, 8, 4, 0)


def test_class_and_row_ends_are_left_out():
    raw = ModelConfig.from_dict(mlxvlm_config())
    image = raw.prompt.image_token_id
    tokens = np.array([[5, *[image] * (1 + 2 * 4), 7]])
    batch = Batch(None, tokens, ["a"], [Cut(1, (2, 3), (30, 20))], *[np.zeros(0)] * 3)
    found = places(batch, raw)
    assert found.tokens[:6, 0].tolist() == [2, 3, 4, 6, 7, 8]
    assert found.teacher[:6].tolist() == [11 * 24 + 10 + x for x in (0, 1, 2, 24, 25, 26)]
    assert found.weights.sum() == pytest.approx(1) and not found.weights[6:].any()


def mlxvlm_config() -> dict:
    from test_eve import published

    return published(672).to_dict()


def test_a_teacher_cached_is_a_teacher_at_hand(place, tmp_path):
    words = ["cache-embeddings", place / "rows.jsonl", "--images", place / "images"]
    words += ["-m", place / "model", "--out", tmp_path / "cache", "--codec", "float32"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "model has no frozen encoder: its patches are embedded by what trains" in done.output
    assert str(place / "teacher") in done.output
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache["0.png"].array.shape == (1, 576, TEACHER)
    train(place, tmp_path / "plain")
    cached = {"teacher_cache": str(tmp_path / "cache"), "teacher": str(tmp_path / "gone")}
    train(place, tmp_path / "cached", **cached)
    ours, theirs = (lines(tmp_path / name) for name in ("cached", "plain"))
    for name in ("loss", "teacher_loss"):
        pairs = [
            (one[name], two[name]) for one, two in zip(ours, theirs, strict=True) if name in one
        ]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)
    assert len(pairs) >= 3
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--at", "projector"]])
    assert done.exit_code == 2 and "has no frozen encoder" in done.output


def test_stages_go_on_with_the_aligner_and_models_are_without_it(place, tmp_path):
    before = mlxvlm.load(place / "model")
    train(place, tmp_path / "one", iters=12)
    first = [line["teacher_loss"] for line in lines(tmp_path / "one") if "teacher_loss" in line]
    assert first[0] - first[-1] > 0.05  # it learns
    one = mlxvlm.load(tmp_path / "one")
    assert "aligner" not in one and one.config == before.config
    names = dict(tree_flatten(one.parameters()))
    assert not [name for name in names if "aligner" in name]
    changed = {
        name.split(".")[0]
        for name, value in tree_flatten(before.parameters())
        if not mx.array_equal(value, names[name]).item()
    }
    assert changed == {"vision", "projector"}
    flags = {"model": str(tmp_path / "one"), "train": "projector,lm,vision"}
    train(place, tmp_path / "two", "sft", **flags)
    again = lines(tmp_path / "two")
    assert [line["teacher_loss"] for line in again if "teacher_loss" in line][0] < first[0] - 0.05
    (tmp_path / "one" / "aligner.safetensors").unlink()
    train(place, tmp_path / "fresh", "sft", **flags)
    fresh = [line["teacher_loss"] for line in lines(tmp_path / "fresh") if "teacher_loss" in line]
    assert fresh[0] > first[-1] + 0.05
    asked = [{"role": "user", "content": "What?"}], [picture(1, 60)[:5]]
    assert mlxvlm.load(tmp_path / "two").generate(*asked, max_tokens=3).tokens


def test_resumed_equals_uninterrupted(place, tmp_path):
    flags = {"save_every": 2, "train": "projector,lm,vision", "batching": "pack"}
    flags |= {"pack_length": 256, "val_data": str(place / "rows.jsonl"), "iters": 3}
    whole = train(place, tmp_path / "whole", "sft", **flags)

    def stop(kind, values):
        if kind == "checkpoint" and values["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config(place, tmp_path / "cut", "sft", **flags), stop).run()
    again = train(place, tmp_path / "cut", "sft", **flags, resume=True)
    ours, theirs = (dict(tree_flatten(t.vlm.parameters())) for t in (again, whole))
    assert ours and all(mx.array_equal(ours[n], value).item() for n, value in theirs.items())
    ends = [[line["loss"] for line in lines(tmp_path / name)] for name in ("cut", "whole")]
    assert ends[0] == ends[1]


def test_packed_equals_one_by_one(place, tmp_path):
    flags = {"iters": 1, "batch_size": 4}
    train(place, tmp_path / "rows", **flags, batching="buckets")
    packed = {"batching": "pack", "pack_length": 512, "pack_views": 0}
    train(place, tmp_path / "packed", **flags, **packed, grad_checkpoint=True)
    (one,), (two,) = lines(tmp_path / "rows"), lines(tmp_path / "packed")
    for name in ("loss", "teacher_loss", "grad_norm"):
        assert abs(one[name] - two[name]) < 1e-4 * abs(one[name])


def test_a_teacher_can_be_done_without(place, tmp_path):
    train(place, tmp_path / "none", iters=1, teacher="none")
    assert "teacher_loss" not in lines(tmp_path / "none")[0]
    assert not (tmp_path / "none" / "aligner.safetensors").exists()
    lora = train(place, tmp_path / "lora", "lora", iters=1, train="lora:lm")
    assert lora.teacher is None and "teacher_loss" not in lines(tmp_path / "lora")[0]


def test_teachers_that_cannot_be(place, tmp_path):
    with pytest.raises(ConfigError, match="vision has no blocks to put adapters on"):
        Trainer(config(place, tmp_path, "lora", train="lora:vision"))
    with pytest.raises(UsageError, match="gives adapters"):
        Trainer(config(place, tmp_path, "lora", train="lora:lm", teacher=str(place / "teacher")))
    with pytest.raises(UsageError, match="targets.teacher is what the teacher's part is called"):
        config(place, tmp_path, targets={"teacher": {}})
    save(tiny_vlm(), tmp_path / "other")
    with pytest.raises(UsageError, match="which this one is not"):
        Trainer(config(place, tmp_path, model=str(tmp_path / "other"), teacher="a", train="lm"))
    large = write_teacher(tmp_path / "large", size=96)
    with pytest.raises(ConfigError, match="gives 2304 tokens of a picture"):
        Trainer(config(place, tmp_path, teacher=str(large)))
    words = ["cache-embeddings", place / "images", "-m", place / "teacher"]
    CliRunner().invoke(app, [str(word) for word in [*words, "--out", tmp_path / "cache"]])
    with pytest.raises(CacheError, match="no cache of a teacher of this model"):
        Trainer(config(place, tmp_path, teacher_cache=str(tmp_path / "cache")))
