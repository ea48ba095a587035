"""EVE: its patch embedding layer against the formulas in float64, shapes, prompt, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read, write
from eve_folders import HEADS, TEXT, WIDTH, write_eve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import picture
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, TilingConfig
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.images.tiling import plan_cut, tile, view_sizes
from mlxvlm.merge import visual_tokens
from mlxvlm.vision.build import build_vision
from mlxvlm.weights.families import eve
from mlxvlm.weights.load import load_prompting
from mlxvlm.weights.save import save

Arrays = dict[str, np.ndarray]
MEAN, STD = np.array(eve.CLIP_MEAN), np.array(eve.CLIP_STD)


@pytest.fixture(scope="module", params=[1, 2], ids=["672", "1344"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eve(tmp_path_factory.mktemp("eve") / "model", ratio=request.param)


def layer_norm(x: np.ndarray, p: Arrays, name: str) -> np.ndarray:
    x = x - x.mean()
    return x / np.sqrt((x * x).mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def look_at(query: np.ndarray, keys: list[np.ndarray], p: Arrays, name: str) -> np.ndarray:
    """query + projection of what each head finds; every head is scaled by the whole width."""
    q = p[f"{name}.q.1.weight"] @ layer_norm(query, p, f"{name}.q.0")
    kv = [p[f"{name}.kv.1.weight"] @ layer_norm(key, p, f"{name}.kv.0") for key in keys]
    each, out = WIDTH // HEADS, []
    for head in range(HEADS):
        part = slice(head * each, (head + 1) * each)
        scores = np.array([q[part] @ one[:WIDTH][part] for one in kv]) / math.sqrt(WIDTH)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        out.append(sum(s * one[WIDTH:][part] for s, one in zip(shares, kv, strict=True)))
    return query + p[f"{name}.proj.weight"] @ np.concatenate(out) + p[f"{name}.proj.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference(p: Arrays, view: np.ndarray) -> np.ndarray:
    """Visual tokens of a normalised view [H, W, 3], token by token."""
    at = "model.vision_tower"
    kernel = p[f"{at}.patch_embedding.weight"]  # [D, C, P, P]
    h, w = view.shape[0] // 4, view.shape[1] // 4

    def patch(y: int, x: int) -> np.ndarray:
        pixels = view[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].transpose(2, 0, 1)
        return (kernel * pixels).sum((1, 2, 3))

    cells = []
    for i in range(h):
        for j in range(w):
            four = [patch(2 * i + y, 2 * j + x) for y in (0, 1) for x in (0, 1)]
            cells.append(look_at(np.mean(four, 0), four, p, f"{at}.local_attention"))
    rows = [look_at(p[f"{at}.class_embedding"], cells, p, f"{at}.global_attention")]
    for i in range(h):
        rows += [*cells[i * w : (i + 1) * w], p[f"{at}.split_embedding"]]
    hidden = np.stack(rows) @ p["model.mm_projector.0.weight"].T + p["model.mm_projector.0.bias"]
    return gelu(hidden) @ p["model.mm_projector.2.weight"].T + p["model.mm_projector.2.bias"]


def test_visual_tokens_follow_the_formulas(folder):
    vlm = mlxvlm.load(folder)
    p = {name: np.array(value, np.float64) for name, value in read(folder)[1].items()}
    seen = vlm.look([picture(1, 60)[:8], picture(2, 60)[:, :5], picture(3, 60)[:8]])
    found, at = np.array(vlm.project(seen)), 0
    for one in seen:
        (view,) = one.views
        wanted = reference(p, (view / 255 - MEAN) / STD)
        assert len(wanted) == visual_tokens(vlm.config, one.cut)
        np.testing.assert_allclose(found[at : at + len(wanted)], wanted, atol=2e-5)
        at += len(wanted)
    assert at == len(found) and np.abs(found).max() > 0.5


EXAMPLES = [
    ((336, 336), 601, 2353),
    ((640, 480), 451, 1765),
    ((480, 640), 457, 1777),
    ((1000, 300), 201, 785),
    ((1920, 1080), 351, 1373),
]


def published(size: int) -> ModelConfig:
    vision, tiling = eve.choices(f"openai/eve-patch14-anypixel-{size}")
    return ModelConfig(
        tiling=tiling,
        vision=vision,
        projector=ProjectorConfig(type="mlp"),
        prompt=PromptConfig(merge="rows"),
    )


@pytest.mark.parametrize(("size", "small", "large"), EXAMPLES)
def test_tokens_of_the_published_geometries(size, small, large):
    for side, tokens in ((672, small), (1344, large)):
        config = published(side)
        cut = plan_cut(Image.new("RGB", size), config.tiling)
        assert visual_tokens(config, cut) == tokens
    assert config.tokens_per_view == 2353


def test_a_view_and_its_teachers_are_aligned():
    image = Image.fromarray(picture(1, 640)[:480])
    whole = TilingConfig(type="whole", image_size=672)
    (view,) = tile(image, whole).views
    assert view.shape == (504, 672, 3)
    centred = TilingConfig(type="centred", image_size=336, background=(122, 116, 104))
    (canvas,) = tile(image, centred).views
    # 18 of 24 cells: three above, and three below.
    assert (canvas[:42] == (122, 116, 104)).all() and (canvas[-42:] == (122, 116, 104)).all()
    wanted = np.array(image.resize((336, 252), Image.Resampling.BICUBIC))
    assert (canvas[42:-42] == wanted).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 2]))
def test_any_picture_has_whole_cells(width, height, ratio):
    tiling = TilingConfig(type="whole", image_size=96 * ratio, patch_size=2)
    cut = plan_cut(Image.new("RGB", (width, height)), tiling)
    rows, columns = cut.grid
    assert max(rows, columns) == 24 * ratio and min(rows, columns) >= ratio
    assert rows % ratio == columns % ratio == 0
    (size,) = view_sizes(cut, tiling)
    assert size == (4 * columns, 4 * rows)
    # Stretched by less than a cell.
    short, long = sorted((width, height))
    assert 0 <= min(rows, columns) // ratio - 24 * short / long < 1


def test_its_size_is_the_published_ones():
    # Conv 14 x 14 x 3, two attentions of 1024, the class and split tokens.
    vision = build_vision(published(672).vision)
    count = sum(value.size for _, value in tree_flatten(vision.parameters()))
    attention = 1024 * 1024 * 4 + 1024 + 4 * 1024
    assert count == 1024 * 14 * 14 * 3 + 2 * attention + 2 * 1024


def test_a_prompt_is_vicunas(folder):
    vlm = mlxvlm.load(folder)
    prompt = vlm.tokenize([{"role": "user", "content": "What is this?"}], [picture(1, 60)[:30]])
    image = vlm.config.prompt.image_token_id
    count = visual_tokens(vlm.config, prompt.pictures[0].cut)
    assert prompt.slots[0][1] == count == (prompt.tokens == image).sum()
    text = vlm.tokenizer.decode([t for t in prompt.tokens.tolist() if t != image])
    assert text.startswith("A chat between") and text.endswith("What is this? ASSISTANT:")


def test_answers_do_not_hang_on_company(folder):
    """Pictures of many shapes in a batch, in a conversation, and alone."""
    vlm = mlxvlm.load(folder)
    asks = []
    for number, (height, width) in enumerate(((60, 6), (6, 60), (60, 9))):
        asks.append(
            ([{"role": "user", "content": f"{number}?"}], [picture(number, 60)[:height, :width]])
        )
    alone = [vlm.generate(*ask, max_tokens=3).tokens for ask in asks]
    together = dict(vlm.batch(asks, max_tokens=3))
    assert [together[number].tokens for number in range(3)] == alone
    both = [{"role": "user", "content": "Which?"}], [asks[0][1][0], asks[1][1][0]]
    assert vlm.generate(*both, max_tokens=1).prompt_tokens > 60
    other = picture(9, 60)[:, :6]
    assert vlm.generate(asks[0][0], [other], max_tokens=3).tokens != alone[0]


def test_it_is_saved_in_our_own_layout(folder, tmp_path):
    vlm = mlxvlm.load(folder)
    save(vlm, tmp_path / "own")
    again = mlxvlm.load(tmp_path / "own")
    assert again.config == vlm.config
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (again, vlm))
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())
    assert theirs["language.model.norm.weight"].shape == (TEXT,)


def test_what_training_alone_needs_is_left_unread(tmp_path):
    source = write_eve(tmp_path / "model")
    wanted = (
        mlxvlm.load(source)
        .generate([{"role": "user", "content": "?"}], [picture(1)[:4]], max_tokens=3)
        .tokens
    )
    tensors = read(source)[1]
    for name in (
        "model.vision_tower_clip.vision_tower.vision_model.post_layernorm.weight",
        "model.vision_clip.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower_compressor.norm_layer.0.0.weight",
        "model.vision_tower.compressor.input_layer.weight",
    ):
        tensors[name] = mx.ones((3,))
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    vlm = mlxvlm.load(source)
    assert (
        vlm.generate([{"role": "user", "content": "?"}], [picture(1)[:4]], max_tokens=3).tokens
        == wanted
    )
    del tensors["model.vision_tower.split_embedding"]
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing: vision.embeddings.split_embedding"):
        mlxvlm.load(source)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mm_projector_type": "linear"}, "only mlp2x_gelu"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "a name like openai/eve-"),
        ({"mm_vision_tower": "openai/eve-patch2-anypixel-100"}, r"must be a multiple of"),
    ],
)
def test_what_a_config_cannot_mean(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        load_prompting(write_eve(tmp_path / "a", **changes))


def test_its_choices_go_together():
    good = published(672).to_dict()
    for part, change in (
        ("prompt", {"merge": "flat"}),
        ("projector", {"type": "attention"}),
        ("tiling", {"type": "single"}),
        ("vision", {"model_type": "siglip_vision_model", "positions": "buckets"}),
    ):
        raw = json.loads(json.dumps(good))
        raw[part].update(change)
        with pytest.raises(ConfigError):
            ModelConfig.from_dict(raw)
    assert ModelConfig.from_dict(good) == published(672)


def test_a_fresh_one_is_built_on_a_language_model(tmp_path):
    source = write_eve(tmp_path / "source")
    config, tensors = read(source)
    raw = {k: v for k, v in config.items() if not k.startswith(eve.BESIDE)}
    kept = {k: v for k, v in tensors.items() if "vision_tower" not in k and "mm_proj" not in k}
    write(tmp_path / "language", {**raw, "model_type": "llama"}, kept)
    words = ["build", "--vision", "eve-patch14-anypixel-672", "--language", tmp_path / "language"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--out", tmp_path / "model"]])
    assert done.exit_code == 0 and "up to 601 visual tokens" in done.output, done.output
    vlm = mlxvlm.load(tmp_path / "model")
    assert vlm.config.vision == published(672).vision
    assert (vlm.config.prompt.layout, vlm.config.prompt.merge) == ("vicuna_v1", "rows")
    assert vlm.vision.embeddings.patch_embedding.weight.shape == (1024, 14, 14, 3)
    theirs = mlxvlm.load(source).language.lm_head.weight
    assert mx.array_equal(vlm.language.lm_head.weight, theirs).item()
    wrong = [*words, "--out", tmp_path / "no", "--tiling", "dynamic"]
    done = CliRunner().invoke(app, [str(word) for word in wrong])
    assert done.exit_code == 2 and "pictures keep their shape" in done.output
