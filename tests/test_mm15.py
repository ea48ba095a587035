"""MM1.5 as a row of choices: built by flags, talked to, cached, trained by its recipe, saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from tiny_mm15 import TOKENS, clip_folder, mm15
from tiny_vlm import IMAGE, picture, tiny_config
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.boxes import Box, parse
from mlxvlm.chat import Conversation
from mlxvlm.cli.main import app
from mlxvlm.config import ProjectorConfig, VisionConfig
from mlxvlm.model import VLM
from mlxvlm.projectors.build import build_projector
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import read_recipe, stage_config
from mlxvlm.vision.carry import resize_table
from mlxvlm.weights.save import save

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "mm1.5"


def command(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


def flat(vlm: VLM) -> dict[str, mx.array]:
    return dict(tree_flatten(vlm.parameters()))


def show(vlm: VLM, tokens: np.ndarray) -> str:
    """A prompt's text, each stretch of visual tokens as its length in angles."""
    assert vlm.tokenizer is not None
    out, run = "", 0
    for token in [*tokens.tolist(), -1]:
        if token == IMAGE:
            run += 1
            continue
        out += f"<{run}>" if run else ""
        run = 0
        if token >= 0:
            out += vlm.tokenizer.decode([token], skip_special=False)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower, a language model's config, and a model of them, built for larger views."""
    place = tmp_path_factory.mktemp("mm15")
    clip_folder(place / "clip")
    save(mm15(), place / "tokens")
    language = place / "language"
    language.mkdir()
    for file in place.glob("tokens/*token*"):
        (language / file.name).write_bytes(file.read_bytes())
    raw = {**tiny_config().language, "max_position_embeddings": 4096}
    (language / "config.json").write_text(json.dumps(raw))
    said = command(
        *("build", "--vision", place / "clip", "--language", language, "--fresh-language"),
        *("--image-size", 48, "--tiling", "cover-2x2", "--view-marks", "index"),
        *("--projector", "c_abstractor", "--num-query-tokens", 4, "--projector-width", 24),
        *("--projector-layers", 1, "--layout", "llama-3", "--out", place / "model"),
    )
    assert "4 visual tokens a view, 4 tiles a picture, and the whole" in said, said
    (place / "images").mkdir()
    for number, size in enumerate([(90, 60), (30, 120), (64, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
    return place


def test_a_model_is_built_by_plain_flags(place):
    raw = json.loads((place / "model" / "config.json").read_text())
    assert raw["vision"]["image_size"] == raw["tiling"]["image_size"] == 48
    assert raw["tiling"]["type"] == "cover" and raw["tiling"]["grids"] == [[2, 2]]
    assert raw["tiling"]["resize"] == "pad" and raw["tiling"]["background"] == [122, 116, 104]
    assert raw["prompt"]["merge"] == "index"
    vlm = mlxvlm.load(place / "model")
    table = vlm.vision.embeddings.position_embedding.weight
    stored = mm15().vision.embeddings.position_embedding.weight
    assert table.shape == (1 + 12 * 12, 32) and mx.array_equal(table[0], stored[0])
    assert mx.array_equal(table, resize_table(stored, 8, 12))
    wanted = flat(mm15())
    for name, value in flat(vlm).items():
        if name.startswith("vision.") and "position" not in name:
            assert mx.array_equal(value, wanted[name]), name
    reply = vlm.generate([{"role": "user", "content": "?"}], [place / "images" / "0.png"])
    assert reply.tokens
    for flags, told in {
        ("--view-marks", "index"): "--view-marks belongs to --tiling dynamic, cover or cover-2x2",
        ("--tiling", "cover-2x2", "--max-tiles", "3"): "--max-tiles belongs to --tiling",
    }.items():
        words = ["build", "--vision", place / "clip", "--language", place / "language"]
        said = command(*words, "--fresh-language", *flags, "--out", place / "none", code=2)
        assert told in " ".join(said.split()), said


def test_a_later_stage_may_see_finer(place, tmp_path):
    save(mm15(), tmp_path / "a")
    command("convert", "-m", tmp_path / "a", "--out", tmp_path / "b", "--image-size", 48)
    command(
        *("convert", "-m", tmp_path / "b", "--out", tmp_path / "c", "--tiling", "cover"),
        *("--view-marks", "none"),
    )
    first, then, last = (mlxvlm.load(tmp_path / name) for name in "abc")
    wanted = mm15()
    wanted.resize_views(48)
    assert all(mx.array_equal(value, flat(then)[name]) for name, value in flat(wanted).items())
    assert then.config == wanted.config and first.config == mm15().config
    assert last.config.tiling.max_tiles == 9 and last.config.prompt.merge == "flat"
    assert last.look([picture(0)])[0].cut.views == 5
    single = tmp_path / "d"
    command("convert", "-m", tmp_path / "b", "--out", single, "--tiling", "single")
    assert mlxvlm.load(single).look([picture(0)])[0].cut.views == 1


def test_saving_and_loading_is_lossless(tmp_path):
    vlm = mm15(tiling="cover", merge="index")
    save(vlm, tmp_path)
    again = mlxvlm.load(tmp_path)
    assert again.config == vlm.config and flat(again).keys() == flat(vlm).keys()
    assert all(mx.array_equal(value, flat(vlm)[name]) for name, value in flat(again).items())


def test_where_views_stand_in_a_prompt():
    question = [{"role": "user", "content": "What?"}]
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    tail = "\nWhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    for style, marked in {
        "flat": f"<{5 * TOKENS}>",
        "separators": "<4>,<4>\n<4>,<4>:<4>",
        "index": "(0,1,1)<4>(0,1,2)<4>(0,2,1)<4>(0,2,2)<4>(0,0,0)<4>",
    }.items():
        vlm = mm15(merge=style)
        prompt = vlm.tokenize(question, [picture(0)])
        assert show(vlm, prompt.tokens) == head + marked + tail
        ((start, length),) = prompt.slots
        assert prompt.tokens[start] == prompt.tokens[start + length - 1] == IMAGE
        assert not prompt.supervised.any() and (prompt.turns[start : start + length] == -1).all()
        if style == "flat":
            continue
        # Marks are text, and heard.
        inside = prompt.tokens[start : start + length]
        other = prompt.tokens.copy()
        other[start + int(np.flatnonzero(inside != IMAGE)[0])] = ord("x")
        seen, heard = (vlm(t[None], prompt.pictures)[0, -1] for t in (prompt.tokens, other))
        assert not mx.allclose(seen, heard, atol=1e-4)
    vlm = mm15(merge="index")
    three = vlm.tokenize(question, [picture(n) for n in range(3)])
    assert show(vlm, three.tokens) == head + "(0,0,0)<4>\n(1,0,0)<4>\n(2,0,0)<4>" + tail
    two = vlm.tokenize(question, [picture(0), picture(1)])
    assert [p.cut.views for p in two.pictures] == [5, 5]
    assert "(1,2,2)<4>(1,0,0)<4>" in show(vlm, two.tokens)


def test_chat_about_several_pictures():
    vlm = mm15()
    chat = Conversation(vlm, max_tokens=5)
    chat.add(picture(0), picture(1))
    for text in ("Which?", "And now?"):
        said = "".join(chunk.text for chunk in chat.ask(text))
        fresh = vlm.generate([*chat.messages[:-1]], chat.pictures, max_tokens=5)
        assert said == fresh.text
    chat.add(picture(2))
    assert [p.cut.views for p in chat.pictures] == [5, 5, 5]  # each was alone with its question
    said = "".join(chunk.text for chunk in chat.ask("This one?"))
    assert said == vlm.generate(chat.messages[:-1], chat.pictures, max_tokens=5).text
    question = [{"role": "user", "content": "?"}]
    answers = {
        vlm.generate(question, [picture(a), picture(b)], max_tokens=6).text
        for a, b in ((0, 1), (1, 0), (0, 2))
    }
    assert len(answers) == 3


def test_examples_in_context_are_earlier_turns():
    """Few-shot: each example's picture stands in its turn, and all of them matter."""
    vlm = mm15(merge="index")

    def shots(*seeds: int) -> tuple[list[dict], list]:
        messages: list[dict] = []
        for seed in seeds:
            asked = [{"type": "image"}, {"type": "text", "text": "Where?"}]
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": f"[{100 + seed}, 200]"})
        return messages[:-1], [picture(seed) for seed in seeds]

    prompt = vlm.tokenize(*shots(0, 1, 2, 3))
    text = show(vlm, prompt.tokens)
    # Four pictures, none split, each before its own question and answer.
    assert len(prompt.slots) == 4 and [p.cut.views for p in prompt.pictures] == [1] * 4
    order = [text.index(part) for part in ("(0,0,0)", "[100, 200]", "(1,0,0)", "[101, 200]", "(3,")]
    assert order == sorted(order) and text.count("Where?") == 4
    logits = [
        vlm(p.tokens[None], p.pictures)[0, -1]
        for p in (prompt, vlm.tokenize(*shots(4, 1, 2, 3)), vlm.tokenize(*shots(0, 1, 2, 4)))
    ]
    assert not mx.allclose(logits[0], logits[1], atol=1e-4)
    assert not mx.allclose(logits[0], logits[2], atol=1e-4)
    # One example fits with both pictures split.
    assert [p.cut.views for p in vlm.tokenize(*shots(0, 1)).pictures] == [5, 5]


def rows(place: Path, path: Path, *kinds: str) -> Path:
    """Rows of a question about one picture, about two or three, or about none."""
    out = []
    for number, kind in enumerate(kinds * 3):
        images = {"single": [0], "multi": [0, 1, 2][: 2 + number % 2], "text": []}[kind]
        turns = [
            {"role": "user", "content": f"Where? {number}"},
            {"role": "assistant", "content": f"red star: [{number}, 200, 310, 422]"},
        ]
        out.append({"images": [f"{image}.png" for image in images], "messages": turns})
    lines = [json.dumps(row) for row in out]
    listed = path.suffix == ".json"
    path.write_text(f"[{','.join(lines)}]" if listed else "\n".join(lines))
    return path


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("batching", ["buckets", "pack"])
def test_training_with_the_cache_equals_training_without(place, tmp_path, batching):
    data = rows(place, tmp_path / "rows.jsonl", "single", "multi", "text")
    words = ("cache-embeddings", data, "--images", place / "images", "-m", place / "model")
    command(*words, "--out", tmp_path / "cache", "--codec", "float32")
    flags = {
        "model": str(place / "model"),
        "data": str(data),
        "images": str(place / "images"),
        "iters": 3,
        "batch_size": 3,
        "max_seq_length": 1024,
        "strict": True,
        "batching": batching,
        "learning_rate": 1e-3,
    }
    for name, more in (("a", {}), ("b", {"cache": str(tmp_path / "cache")})):
        Trainer(stage_config("sft", flags | more | {"out": str(tmp_path / name)})).run()
    plain = losses(tmp_path / "a")
    assert len(set(plain)) == 3
    np.testing.assert_allclose(losses(tmp_path / "b"), plain, rtol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "continual", "sft"])
def test_a_stage_of_its_recipe_trains(place, tmp_path, stage):
    recipe = read_recipe(RECIPES / f"{stage}.toml")
    assert recipe["optimizer"] == "adafactor" and recipe["learning_rate"] == 1e-5
    assert recipe["batch_size"] * recipe["grad_accumulation_steps"] == 256
    text = (RECIPES / f"{stage}.toml").read_text()
    for source in recipe["sources"]:
        name = Path(source.data).name
        kinds = {"text": ["text"], "multi": ["multi"]}.get(source.name, ["single"])
        rows(place, tmp_path / name, *kinds)
        if source.images:
            folder = Path(source.images).name
            if not (tmp_path / folder).exists():
                (tmp_path / folder).symlink_to(place / "images")
    (tmp_path / "recipe.toml").write_text(text)
    flags = {
        "model": str(place / "model"),
        "out": str(tmp_path / "out"),
        "iters": 2,
        "grad_accumulation_steps": 2,
        "grad_checkpoint": False,
        "max_seq_length": 1024,
    }
    trainer = Trainer(stage_config("sft", flags, tmp_path / "recipe.toml"))
    before = {name: mx.array(value) for name, value in trainer.trainable().items()}
    trainer.run()
    assert {name.split(".")[0] for name in before} == {"vision", "projector", "language"}
    assert len(losses(tmp_path / "out")) == 2 and all(map(math.isfinite, losses(tmp_path / "out")))
    after = flat(mlxvlm.load(tmp_path / "out"))
    moved = {name for name, value in before.items() if not mx.array_equal(after[name], value)}
    assert len(moved) > 0.9 * len(before)
    assert "vision.embeddings.position_embedding.weight" in moved


def test_the_mixture_is_mm15s():
    said = read_recipe(RECIPES / "sft.toml")["mixture"]
    assert said.alpha == {"science": 0.1, "math": 0.5, "code": 0.2, "refer-ground": 2.0}
    assert said.ratio == {"single": 0.8, "multi": 0.1, "text": 0.1}
    first = read_recipe(RECIPES / "pretrain.toml")["sources"]
    assert [source.weight for source in first] == [0.5, 0.1, 0.4]
    second = read_recipe(RECIPES / "continual.toml")
    assert {source.weight for source in second["sources"]} == {1.0} and second["iters"] == 30000


def test_places_in_answers_are_thousandths():
    boxes, left_out = parse("red star: [105, 200, 310, 422], its tip: [207,200]")
    assert boxes == [Box("red star", 105, 200, 310, 422), Box("its tip", 207, 200, 207, 200)]
    assert not left_out and boxes[1].is_point and not boxes[0].is_point
    assert boxes[0].pixels(2000, 1000) == (210, 200, 620, 422)


def test_the_abstractor_is_honeybees():
    """Against the formulas of its paper and timm's RegStage in float64, 9 x 9 patches to 4 x 4,
    in uneven bins."""
    grid, side, width, channels, wide = 9, 4, 10, 6, 7
    config = ProjectorConfig(
        type="c_abstractor", hidden_size=width, num_layers=3, num_query_tokens=side * side
    )
    vision = VisionConfig(
        hidden_size=channels, num_hidden_layers=1, num_attention_heads=1, image_size=9, patch_size=1
    )
    projector = build_projector(config, vision, wide)
    rng = np.random.default_rng(0)
    p = {}
    for name, value in dict(tree_flatten(projector.parameters())).items():
        drawn = rng.standard_normal(value.shape) / max(1, value[0].size) ** 0.5
        p[name] = drawn.astype(np.float32).astype(np.float64)
    projector.load_weights([(n, mx.array(v.astype(np.float32))) for n, v in p.items()])
    x = rng.standard_normal((2, grid * grid, channels)).astype(np.float32)

    def silu(y):
        return y / (1 + np.exp(-y))

    def norm(name, y):
        mean, var = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
        return (y - mean) / np.sqrt(var + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name, y):
        return y @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def depthwise(name, y):
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        n = y.shape[1]
        return sum(
            padded[:, i : i + n, j : j + n] * p[f"{name}.weight"][:, i, j, 0]
            for i in range(3)
            for j in range(3)
        )

    def block(at, y):
        z = silu(norm(f"{at}.norm1", linear(f"{at}.conv1", y)))
        z = silu(norm(f"{at}.norm2", depthwise(f"{at}.conv2", z)))
        gate = linear(f"{at}.se.fc2", silu(linear(f"{at}.se.fc1", z.mean((1, 2)))))
        z = z / (1 + np.exp(-gate))[:, None, None]
        z = norm(f"{at}.norm3", linear(f"{at}.conv3", z))
        if f"{at}.shortcut_conv.weight" in p:
            y = norm(f"{at}.shortcut_norm", linear(f"{at}.shortcut_conv", y))
        return silu(y + z)

    y = (x + p["position_embedding.weight"]).reshape(2, grid, grid, channels)
    for number in range(3):
        y = block(f"stage1.{number}", y)
    # torch's adaptive bins: floor(i n / m) to ceil((i + 1) n / m).
    bins = [(i * grid // side, -(-(i + 1) * grid // side)) for i in range(side)]
    assert {b - a for a, b in bins} == {3}
    y = np.stack([np.stack([y[:, a:b, c:d].mean((1, 2)) for c, d in bins], 1) for a, b in bins], 1)
    for number in range(3):
        y = block(f"stage2.{number}", y)
    wanted = linear("linear_2", silu(linear("linear_1", y.reshape(2, side * side, width))))
    np.testing.assert_allclose(np.array(projector(mx.array(x))), wanted, atol=2e-5, rtol=2e-4)
    squeezed = p["stage1.0.se.fc1.weight"].shape, p["stage2.0.se.fc1.weight"].shape
    assert squeezed == ((round(channels / 4), width), (round(width / 4), width))
