"""InternVL without transformers: tower, unshuffle and projector by their formulas, every layout of
files, its prompt, and the way through the commands."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read
from internvl_folders import LAYOUTS, opengvlab, rewrite, write_internvl
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import picture
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig, ProjectorConfig, TilingConfig, VisionConfig
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.images.tiling import plan_cut
from mlxvlm.merge import visual_tokens
from mlxvlm.projectors.build import build_projector
from mlxvlm.prompts.internvl import SYSTEM
from mlxvlm.vision.build import build_vision
from mlxvlm.weights.families import internvit
from mlxvlm.weights.load import load_encoder, load_projected, load_prompting
from mlxvlm.weights.save import save

Arrays = dict[str, np.ndarray]
KINDS = {"300M": False, "6B": True}
INTERNVIT_300M = VisionConfig(
    model_type="internvl_vision",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=448,
    hidden_act="gelu",
    vision_feature_norm=False,
    vision_feature_select_strategy="default",
)
INTERNVIT_6B = dataclasses.replace(
    INTERNVIT_300M,
    hidden_size=3200,
    intermediate_size=12800,
    num_hidden_layers=45,
    num_attention_heads=25,
    norm_type="rms_norm",
    attention_bias=False,
    use_qk_norm=True,
)


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: str = request.param
    return write_internvl(tmp_path_factory.mktemp("internvl") / kind, large=KINDS[kind])


def layer_norm(x: np.ndarray, p: Arrays, name: str, eps: float) -> np.ndarray:
    if f"{name}.bias" not in p:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x: np.ndarray, p: Arrays, name: str) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference(p: Arrays, view: np.ndarray, heads: int = 2) -> np.ndarray:
    """Visual tokens [4, 64] of a normalised view [32, 32, 3], from OpenGVLab's tensors in float64,
    by the formulas and one token at a time where a shape could be right by chance."""
    at = "vision_model.embeddings"
    kernel = p[f"{at}.patch_embedding.weight"]  # [D, C, P, P]
    tokens = [p[f"{at}.class_embedding"][0, 0]]
    for y in range(4):
        for x in range(4):
            patch = view[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].transpose(2, 0, 1)
            tokens.append((kernel * patch).sum((1, 2, 3)) + p[f"{at}.patch_embedding.bias"])
    x = np.stack(tokens) + p[f"{at}.position_embedding"][0]
    for number in range(2):
        at = f"vision_model.encoder.layers.{number}"
        q, k, v = np.split(linear(layer_norm(x, p, f"{at}.norm1", 1e-6), p, f"{at}.attn.qkv"), 3, 1)
        if f"{at}.attn.q_norm.weight" in p:
            q = layer_norm(q, p, f"{at}.attn.q_norm", 1e-6)
            k = layer_norm(k, p, f"{at}.attn.k_norm", 1e-6)
        out = []
        for one, two, three in zip(*(np.split(part, heads, 1) for part in (q, k, v)), strict=True):
            scores = np.exp(one @ two.T / math.sqrt(one.shape[1]))
            out.append(scores / scores.sum(1, keepdims=True) @ three)
        x = x + p[f"{at}.ls1"] * linear(np.concatenate(out, 1), p, f"{at}.attn.proj")
        hidden = gelu(linear(layer_norm(x, p, f"{at}.norm2", 1e-6), p, f"{at}.mlp.fc1"))
        x = x + p[f"{at}.ls2"] * linear(hidden, p, f"{at}.mlp.fc2")
    patches = x[1:].reshape(4, 4, -1)
    cells = []
    for i in range(2):
        for j in range(2):
            cell = [patches[2 * i + r, 2 * j + c] for r in range(2) for c in range(2)]
            cells.append(np.concatenate(cell))
    x = layer_norm(np.stack(cells), p, "mlp1.0", 1e-5)
    return linear(gelu(linear(x, p, "mlp1.1")), p, "mlp1.3")


def test_visual_tokens_follow_the_formulas(folder):
    vlm = mlxvlm.load(folder)
    p = {n: np.array(w, np.float64) for n, w in opengvlab(read(folder)[1]).items()}
    (seen,) = vlm.look([picture(3, 90)[:60]])
    assert seen.grid == (2, 3) and len(seen.views) == 7
    found = np.array(vlm.project([seen])).reshape(7, 4, 64)
    for view, tokens in zip(seen.views, found, strict=True):
        pixels = (view / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(tokens, reference(p, pixels), atol=2e-5)
    assert np.abs(found).max() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_one_model(folder, tmp_path, layout):
    one = mlxvlm.load(folder)
    other = mlxvlm.load(rewrite(folder, tmp_path / layout, layout))
    # An older config.json says more of the language model, all of it without effect.
    assert one.config.language.items() <= other.config.language.items()
    assert dataclasses.replace(other.config, language=one.config.language) == one.config
    assert one.config.projector == ProjectorConfig(
        type="mlp", pool="concat2", layer_norm=True, layer_norm_eps=1e-5
    )
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (one, other))
    assert ours.keys() == theirs.keys() and "vision.encoder.layers.1.attn.qkv.weight" in ours
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())


def test_it_is_saved_in_our_own_layout(folder, tmp_path):
    vlm = mlxvlm.load(folder)
    save(vlm, tmp_path / "own")
    again = mlxvlm.load(tmp_path / "own")
    assert again.config == vlm.config
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (again, vlm))
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())
    for place in (tmp_path / "own", folder):
        assert load_encoder(place).identity() == vlm.encoder.identity()
        assert load_projected(place).identity() == vlm.projected_encoder.identity()


@pytest.mark.parametrize("layout", ["transformers5", "opengvlab"])
def test_a_head_that_is_not_there_is_the_embedding_table(tmp_path, layout):
    """OpenGVLab's config.json says false whatever its language model does."""
    tied = write_internvl(tmp_path / "tied", tied=True)
    vlm = mlxvlm.load(rewrite(tied, tmp_path / layout, layout))
    assert vlm.config.language["tie_word_embeddings"] and "lm_head" not in vlm.language
    # And one that is there is its own, though a config.json says that it is tied.
    own = write_internvl(tmp_path / "own")
    vlm = mlxvlm.load(rewrite(own, tmp_path / f"own {layout}", layout, tie_word_embeddings=True))
    wanted = read(own)[1]["language_model.lm_head.weight"]
    assert mx.array_equal(vlm.language.lm_head.weight, wanted).item()


def test_the_first_version_of_the_unshuffle_goes_by_columns(folder, tmp_path):
    new = mlxvlm.load(rewrite(folder, tmp_path / "new", "opengvlab"))
    old = mlxvlm.load(rewrite(folder, tmp_path / "old", "opengvlab", ps_version="v1"))
    silent = mlxvlm.load(rewrite(folder, tmp_path / "silent", "opengvlab", ps_version=None))
    assert old.config.projector.pool == silent.config.projector.pool == "concat2_columns"
    (seen,) = new.look([picture(1, 32)])
    rows, columns = (np.array(vlm.project([seen])) for vlm in (new, old))
    assert (columns == rows[[0, 2, 1, 3]]).all() and not np.allclose(columns, rows)


def test_what_their_code_reads_of_tiles(folder, tmp_path):
    def tiling(**changes: Any) -> TilingConfig:
        name = "-".join(changes)
        return load_prompting(rewrite(folder, tmp_path / name, "opengvlab", **changes))[0].tiling

    assert tiling(max_dynamic_patch=9) == TilingConfig("dynamic", 32, max_tiles=9)
    bare = tiling(max_dynamic_patch=None, use_thumbnail=None)
    assert bare == TilingConfig("dynamic", 32, max_tiles=6, use_thumbnail=False)
    assert tiling(dynamic_image_size=False) == TilingConfig("single", 32)
    padded = tiling(dynamic_image_size=False, pad2square=True)
    assert (padded.resize, padded.background) == ("pad", (123, 116, 103))
    assert load_prompting(folder)[0].tiling == TilingConfig("dynamic", 32, max_tiles=6)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"template": "internlm2-chat"},
            "prompt template 'internlm2-chat', which is not supported",
        ),
        ({"ps_version": "v3"}, r"ps_version \(='v3'\) must be one of v1, v2"),
        ({"downsample_ratio": 0.25}, r"downsample_ratio \(=0.25\) must be 0.5"),
        (
            {"force_image_size": 64},
            r"force_image_size \(=64\) must be the vision tower's .* \(=32\)",
        ),
        ({"select_layer": [-1, -2]}, "must be one layer, not several"),
        ({"pad2square": True, "dynamic_image_size": True}, None),
    ],
)
def test_what_a_config_cannot_mean(tmp_path, changes, told):
    source = write_internvl(tmp_path / "a")
    place = rewrite(source, tmp_path / "b", "opengvlab", **changes)
    if told is None:  # their code squashes tiles all the same
        assert mlxvlm.load(place).config.tiling.resize == "squash"
        return
    with pytest.raises(ConfigError, match=told):
        mlxvlm.load(place)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    source = write_internvl(tmp_path / "a")
    config, tensors = read(source)
    key = "vision_tower.encoder.layer.0.attention.k_proj.weight"
    kept = tensors.pop(key)
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing: vision.encoder.layers.0.attn.qkv.weight"):
        mlxvlm.load(source)
    tensors[key] = kept[:, :5]
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match="vision model's tensors are not those of a"):
        mlxvlm.load(source)
    # A final norm, which InternVL's features never go through.
    tensors |= {key: kept, "vision_tower.layernorm.weight": mx.ones((32,))}
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match="unexpected: .*layernorm.weight"):
        mlxvlm.load(source)
    place = rewrite(write_internvl(tmp_path / "b"), tmp_path / "c", "opengvlab")
    raw = (place / "tokenizer.json").read_text()
    (place / "tokenizer.json").write_text(raw.replace("<IMG_CONTEXT>", "<OTHER_TOKEN>"))
    with pytest.raises(ConfigError, match="the tokenizer has no <IMG_CONTEXT>"):
        mlxvlm.load(place)


def test_a_prompt_is_internvls(folder):
    vlm = mlxvlm.load(folder)
    wide = np.concatenate([picture(0), picture(1)], axis=1)  # 2 x 1 and a thumbnail
    question = {"role": "user", "content": "What is <IMG_CONTEXT>?"}
    answer = {"role": "assistant", "content": "A circle."}
    prompt = vlm.tokenize([question, answer], [wide])
    text = vlm.tokenizer.decode(prompt.tokens, skip_special=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>"
        + "<IMG_CONTEXT>" * 12
        + "</img>\nWhat is <IMG_CONTEXT>?<|im_end|>\n"
        "<|im_start|>assistant\nA circle.<|im_end|>\n"
    )
    image = vlm.config.prompt.image_token_id
    assert int((prompt.tokens == image).sum()) == 12  # what a user writes is no control token
    learnt = vlm.tokenizer.decode(prompt.tokens[prompt.supervised], skip_special=False)
    assert learnt == "A circle.<|im_end|>"
    ends = vlm.tokenizer.control["<|im_end|>"]
    assert vlm.tokenizer.eos_token_ids == {ends}


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((448, 448), 256),
        ((800, 600), 3328),
        ((1280, 720), 2304),
        ((1080, 1920), 2304),
        ((900, 900), 1280),
        ((2000, 2000), 2560),
        ((1344, 448), 1024),
        ((800, 1300), 1792),
        ((3000, 250), 3328),
        ((100, 1000), 2816),
    ],
)
def test_tokens_of_the_published_geometry(size, tokens):
    config = ModelConfig(
        tiling=TilingConfig("dynamic", 448),
        vision=INTERNVIT_300M,
        projector=ProjectorConfig(type="mlp", pool="concat2", layer_norm=True),
    )
    assert config.tokens_per_view == 256
    assert visual_tokens(config, plan_cut(Image.new("RGB", size), config.tiling)) == tokens


@pytest.mark.parametrize(
    ("vision", "parameters", "widths"),
    [
        # Of the model card: 304.0 M, 5.54 B; the projectors of 1B and 8B, of 26B and 78B.
        (INTERNVIT_300M, 304_012_288, {896: 4_482_816, 4096: 33_570_816}),
        (INTERNVIT_6B, 5_536_496_000, {6144: 116_429_824, 8192: 172_008_448}),
    ],
    ids=["300M", "6B"],
)
def test_sizes_of_the_published_geometries(vision, parameters, widths):
    # Never evaluated: MLX's arrays know their shapes before they hold anything.
    def size(module: Any) -> int:
        return sum(p.size for _, p in tree_flatten(module.parameters()))

    assert size(build_vision(vision)) == parameters
    projector = ProjectorConfig(type="mlp", pool="concat2", layer_norm=True)
    for width, wanted in widths.items():
        assert size(build_projector(projector, vision, width)) == wanted


@pytest.mark.parametrize("layer", [-2, 0, 1])
def test_a_tower_says_what_it_needs(folder, layer):
    whole = mlxvlm.load(folder)
    tower = load_encoder(folder, feature_layer=layer).vision
    names = [name for name, _ in tree_flatten(whole.vision.parameters())]
    used = {name for name, _ in tree_flatten(tower.parameters())}
    assert used == {name for name in names if tower.feeds_features(name)}
    assert {name for name in names if tower.unused(name)} == set(names) - used
    assert not tower.unused("encoder.layers.7.norm1.weight")
    with pytest.raises(ConfigError, match="neither a final norm nor a pooling head"):
        load_encoder(folder, feature_norm=True)


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_tower_alone_is_built_into_a_model(folder, tmp_path, prefixed):
    """OpenGVLab's own folder of a tower, and transformers'; then the commands up to a chat."""
    config, tensors = read(folder)
    stem = "vision_tower." if prefixed else "vision_model."
    tensors = tensors if prefixed else opengvlab(tensors)
    tensors = {n.removeprefix(stem): w for n, w in tensors.items() if n.startswith(stem)}
    raw = config["vision_config"]
    if not prefixed:
        other = {v: k for k, v in internvit.FIELDS.items()}
        raw = {other.get(k, k): v for k, v in raw.items()} | {"model_type": "intern_vit_6b"}
    (tmp_path / "eyes").mkdir()
    (tmp_path / "eyes" / "config.json").write_text(json.dumps(raw))
    path = tmp_path / "eyes" / "model.safetensors"
    mx.save_safetensors(str(path), tensors, {"format": "pt"})
    language = tmp_path / "language"
    language.mkdir()
    (language / "config.json").write_text(json.dumps(config["text_config"]))
    (language / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    words = ["build", "--vision", tmp_path / "eyes", "--language", language, "--fresh-language"]
    words += ["--projector", "mlp", "--pool", "concat2", "--projector-norm", "--tiling", "dynamic"]
    words += ["--layout", "internvl2_5", "--out", tmp_path / "model"]
    assert "4 visual tokens a view, 1 to 12 tiles a picture, and a thumbnail" in run(*words)
    built, whole = mlxvlm.load(tmp_path / "model"), mlxvlm.load(folder)
    assert built.encoder.identity()["sha256"] == whole.encoder.identity()["sha256"]
    assert built.config.vision == whole.config.vision
    (seen,) = built.look([picture(2, 70)[:40]])
    ours, theirs = (vlm.features([seen])[0].array for vlm in (built, whole))
    assert mx.array_equal(ours, theirs).item()
    assert "layer_norm" in built.projector
    wrong = [*words[:-1], tmp_path / "no", "--projector", "attention"]
    assert "--projector-norm belongs to --projector mlp" in run(*wrong, code=2)


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("layout", ["transformers5", "opengvlab"])
def test_chat_cache_and_lora_through_the_commands(folder, tmp_path, layout):
    place = rewrite(folder, tmp_path / "model", layout)
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for i, (width, height) in enumerate(((90, 60), (30, 30), (40, 130))):
        Image.fromarray(picture(i, 130)[:height, :width]).save(images / f"{i}.png")
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{i} it"}]
        rows.append({"images": [f"{i}.png"], "messages": turns})
    rows.append({"images": ["0.png", "2.png"], "messages": turns})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    words = ["chat", images / "0.png", images / "1.png", "-m", place, "-p", "What is this?"]
    words += ["--max-tokens", 8, "--json"]
    said = json.loads(run(*words))
    assert said["generation_tokens"] > 0

    cache = tmp_path / "cache"
    more = ["--images", images, "--out", cache, "--codec", "float32"]
    run("cache-embeddings", data, "-m", place, *more)
    assert json.loads(run(*words, "--cache", cache))["text"] == said["text"]

    def train(name: str, *more: object) -> list[float]:
        flags = ["--data", data, "--iters", 2, "--batch-size", 2, "--max-seq-length", 2048]
        run("lora", "-m", place, *flags, "--seed", 3, "--out", tmp_path / name, *more)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]

    plain = train("plain", "--images", images)
    assert len(plain) == 2 and all(math.isfinite(loss) for loss in plain)
    np.testing.assert_allclose(train("there", "--cache", cache), plain, rtol=1e-5)
    tuned = mlxvlm.load(place, adapter=tmp_path / "plain")
    assert max(mx.abs(v).max().item() for n, v in adapters(tuned)) > 0
    # The tower's own layers may have adapters too, on its one matrix of q, k and v.
    both = train("both", "--images", images, "--train", "lora:vision", "--lora-keys", "attn.qkv")
    assert len(both) == 2


def adapters(vlm: Any) -> list[tuple[str, mx.array]]:
    return [(n, v) for n, v in tree_flatten(vlm.parameters()) if n.endswith("lora_b")]
