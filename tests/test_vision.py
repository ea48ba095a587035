"""Vision towers against stored transformers outputs, and pooling against loops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.config import VisionConfig
from mlxvlm.errors import ConfigError, PictureError
from mlxvlm.vision.blocks import activation
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.clip import ClipVision
from mlxvlm.vision.patches import PatchEmbedding
from mlxvlm.vision.pooling import concat, mean2
from mlxvlm.vision.siglip import Siglip, SiglipText, SiglipTextConfig, SiglipVision

GOLDEN = Path(__file__).parent / "golden"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# 30 pixels at patch 8: a grid of 3 and 6 pixels unused, as 384 at 14 leaves 6.
SIGLIP = VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=30,
    patch_size=8,
)
CLIP = dataclasses.replace(
    SIGLIP,
    model_type="clip_vision_model",
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    vision_feature_layer=-2,
    vision_feature_norm=False,
    vision_feature_select_strategy="default",
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)
TEXT = SiglipTextConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=6,
    projection_size=16,
)


def golden(name: str) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """(weights in our layout, inputs and outputs)"""
    tensors = mx.load(str(GOLDEN / f"{name}.safetensors"))
    assert isinstance(tensors, dict)
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight.")}
    for key in weights:
        if key.endswith("patch_embedding.weight"):
            weights[key] = weights[key].transpose(0, 2, 3, 1)
    return weights, {k: v for k, v in tensors.items() if not k.startswith("weight.")}


def load_tower(config: VisionConfig, weights: dict[str, mx.array]):
    """A tower with the checkpoint's tensors, minus exactly those that it says it does without."""
    tower = build_vision(config)
    weights = {k.removeprefix("vision_model."): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not tower.unused(k)}
    tower.load_weights(list(weights.items()), strict=True)
    return tower


def vision_weights(name: str) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    weights, io = golden(name)
    return {k: v for k, v in weights.items() if not k.startswith(("text_", "logit_"))}, io


def pixels(io: dict[str, mx.array], config: VisionConfig) -> mx.array:
    x = io["in.pixels"].astype(mx.float32) / 255
    return (x - mx.array(config.image_mean)) / mx.array(config.image_std)


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_siglip_features_at_every_layer(layer, head):
    weights, io = vision_weights("siglip")
    config = dataclasses.replace(
        SIGLIP, vision_feature_layer=layer, vision_feature_norm=False, vision_use_head=head
    )
    tower = load_tower(config, weights)
    assert len(tower.encoder.layers) == (3 if head else config.num_layers_used)
    assert difference(tower(pixels(io, config)), io["out.hidden_states"][layer]) < 1e-5


def test_siglip_final_norm_pooling_head_text_and_scores():
    weights, io = golden("siglip")
    model = Siglip(SIGLIP, TEXT)
    model.load_weights(list(weights.items()), strict=True)
    x = pixels(io, SIGLIP)
    assert difference(model.vision_model(x), io["out.last_hidden_state"]) < 1e-5
    assert difference(model.vision_model.pooled(x), io["out.pooled"]) < 1e-5
    assert difference(model.text_model(io["in.ids"]), io["out.text"]) < 1e-5
    assert difference(model.scores(x, io["in.ids"]), io["out.scores"]) < 1e-6


def test_final_norm_follows_the_chosen_layer():
    weights, io = vision_weights("siglip")
    config = dataclasses.replace(SIGLIP, vision_feature_layer=-2)
    got = load_tower(config, weights)(pixels(io, config))
    x = np.array(io["out.hidden_states"][-2], dtype=np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    scale, bias = (
        np.array(weights[f"vision_model.post_layernorm.{k}"]) for k in ("weight", "bias")
    )
    np.testing.assert_allclose(np.array(got), x * scale + bias, atol=1e-5)


@pytest.mark.parametrize("select", ["full", "default"])
@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_clip_features_at_every_layer(layer, select):
    weights, io = vision_weights("clip")
    config = dataclasses.replace(
        CLIP, vision_feature_layer=layer, vision_feature_select_strategy=select
    )
    want = io["out.hidden_states"][layer]
    want = want[:, 1:] if select == "default" else want
    got = load_tower(config, weights)(pixels(io, config))
    assert got.shape[1] == config.num_tokens
    assert difference(got, want) < 1e-5


def test_clip_final_norm():
    weights, io = vision_weights("clip")
    config = dataclasses.replace(CLIP, vision_feature_layer=-1, vision_feature_norm=True)
    got = load_tower(config, weights)(pixels(io, config))
    assert difference(got, io["out.normed"][:, 1:]) < 1e-5


def test_patches_equal_a_convolution_and_leave_the_last_pixels():
    config = dataclasses.replace(SIGLIP, hidden_size=4, image_size=384, patch_size=14)
    patches = PatchEmbedding(config)
    patches.bias = mx.random.normal((4,))
    x = mx.random.normal((2, 384, 384, 3))
    want = mx.conv2d(x, patches.weight, stride=14) + patches.bias
    assert want.shape == (2, 27, 27, 4)
    got = patches(x)
    assert difference(got, want.reshape(2, 729, 4)) < 1e-5
    margin = mx.arange(384) >= 378
    margin = (margin[:, None] | margin[None])[None, :, :, None]
    assert mx.array_equal(patches(mx.where(margin, 9.0, x)), got)
    inside = mx.arange(384) == 377
    inside = (inside[:, None] & inside[None])[None, :, :, None]
    assert not mx.array_equal(patches(mx.where(inside, 9.0, x)), got)


@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_tokens_see_their_whole_view_and_no_other(config):
    tower = build_vision(dataclasses.replace(config, vision_feature_layer=-1))
    x = mx.random.normal((2, 30, 30, 3))
    corner = np.zeros((2, 30, 30, 3), dtype=bool)
    corner[1, 16:24, 16:24] = True
    before, after = tower(x), tower(mx.where(mx.array(corner), x + 1, x))
    assert mx.array_equal(before[0], after[0])
    moved = mx.abs(before[1] - after[1]).max(axis=-1)
    # The last patch changed, and every patch before it heard of it.
    assert moved.min().item() > 1e-6


def test_text_reads_both_ways_and_speaks_from_the_last_place():
    text = SiglipText(TEXT)
    ids = mx.array([[5, 6, 7, 1, 1, 1]])
    base = text(ids)
    for place in range(6):
        changed = np.array(ids)
        changed[0, place] = 9
        assert difference(base, text(mx.array(changed))) > 1e-6
    # Padding counts: a shorter text is another text.
    assert difference(base, text(ids[:, :5])) > 1e-6
    with pytest.raises(ConfigError, match="7 tokens is longer than SigLIP's 6"):
        text(mx.zeros((1, 7), dtype=mx.int32))


def test_unused_names_exactly_what_the_config_does_without():
    config = dataclasses.replace(SIGLIP, vision_feature_layer=-2, vision_feature_norm=False)
    bare, whole = (
        SiglipVision(config),
        SiglipVision(dataclasses.replace(SIGLIP, vision_use_head=True)),
    )
    everything = {name for name, _ in tree_flatten(whole.parameters())}
    mine = {name for name, _ in tree_flatten(bare.parameters())}
    assert {name for name in everything if not bare.unused(name)} == mine
    assert not any(whole.unused(name) for name in everything)
    assert bare.unused("embeddings.position_ids")
    for stranger in ("encoder.layers.3.mlp.fc1.weight", "encoder.layers.x.y", "lm_head.weight"):
        assert not bare.unused(stranger), stranger

    clip = ClipVision(CLIP)
    table = {
        "post_layernorm.weight": True,
        "encoder.layers.2.mlp.fc1.bias": True,
        "embeddings.position_ids": True,
        "encoder.layers.1.mlp.fc1.bias": False,
        "encoder.layers.3.mlp.fc1.bias": False,
        "pre_layrnorm.bias": False,
        "embeddings.class_embedding": False,
        "head.probe": False,
    }
    assert {name: clip.unused(name) for name in table} == table


def test_features_depend_on_just_the_tensors_said_to_feed_them():
    config = dataclasses.replace(SIGLIP, vision_feature_layer=-2, vision_use_head=True)
    tower = SiglipVision(config)
    x = mx.random.normal((1, 30, 30, 3))
    before = tower(x)
    for name, p in tree_flatten(tower.parameters()):
        if name.endswith("k_proj.bias"):
            continue  # a key bias moves all scores of a query alike: softmax does not see it
        tower.load_weights([(name, p + mx.random.normal(p.shape))], strict=False)
        assert mx.array_equal(tower(x), before) != tower.feeds_features(name), name
        tower.load_weights([(name, p)], strict=False)


def test_what_cannot_be_meant_is_refused():
    tower = SiglipVision(SIGLIP)
    with pytest.raises(PictureError, match=r"must be \[30, 30, 3\].*\[29, 30, 3\]"):
        tower(mx.zeros((1, 29, 30, 3)))
    with pytest.raises(ConfigError, match="vision_use_head"):
        tower.pooled(mx.zeros((1, 30, 30, 3)))
    with pytest.raises(ConfigError, match="only SigLIP"):
        ClipVision(dataclasses.replace(CLIP, vision_use_head=True))
    with pytest.raises(ConfigError, match="hidden_act .*'swish2'"):
        SiglipVision(dataclasses.replace(SIGLIP, hidden_act="swish2"))
    with pytest.raises(ConfigError, match="share one space"):
        Siglip(SIGLIP, dataclasses.replace(TEXT, projection_size=12))


@pytest.mark.parametrize(
    "name, formula",
    [
        ("gelu", lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
        (
            "gelu_pytorch_tanh",
            lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        ),
        ("quick_gelu", lambda v: v / (1 + math.exp(-1.702 * v))),
    ],
)
def test_activations(name, formula):
    x = np.linspace(-8, 8, 1601, dtype=np.float32)
    want = np.array([formula(float(v)) for v in x])
    assert np.abs(np.array(activation(name)(mx.array(x))) - want).max() < 1e-6


@pytest.mark.parametrize(
    "geometry, parameters",
    [
        (dict(), 412_987_248),  # So400m/14-384 without its head
        (dict(vision_use_head=True), 412_987_248 + 15_238_352),
        (dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
              num_attention_heads=12, image_size=224, patch_size=16), 85_797_120),
        (dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=256,
              patch_size=16), 303_361_024),
        (dict(hidden_size=1536, intermediate_size=6144, num_hidden_layers=40, image_size=384,
              patch_size=16), 1_135_329_792),
    ],
    ids=["So400m", "So400m-head", "B", "L", "g-opt"],
)  # fmt: skip
def test_sizes_of_the_published_geometries(geometry, parameters):
    # Never evaluated: MLX's arrays know their shapes before they hold anything.
    tower = build_vision(VisionConfig(**geometry))
    assert sum(p.size for _, p in tree_flatten(tower.parameters())) == parameters


def loop_cells(x: np.ndarray, grid: int, window: int):
    """[g*g, D] -> for each cell in rows, its tokens in rows, None beyond the grid"""
    for top in range(0, grid, window):
        for left in range(0, grid, window):
            yield [
                x[r * grid + c] if r < grid and c < grid else None
                for r in range(top, top + window)
                for c in range(left, left + window)
            ]


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 7, 27])
def test_mean2_averages_what_is_there(grid):
    x = np.random.default_rng(grid).normal(size=(2, grid * grid, 5)).astype(np.float32)
    got = np.array(mean2(mx.array(x), grid))
    for n in range(2):
        cells = loop_cells(x[n], grid, 2)
        want = np.stack([np.mean([t for t in cell if t is not None], axis=0) for cell in cells])
        np.testing.assert_allclose(got[n], want, atol=1e-6)
    if grid == 27:
        assert got.shape[1] == 196


@pytest.mark.parametrize("grid, window", [(3, 2), (4, 2), (27, 2), (4, 3), (6, 3), (27, 3)])
def test_concat_sets_neighbours_side_by_side(grid, window):
    x = np.random.default_rng(grid).normal(size=(2, grid * grid, 5)).astype(np.float32)
    got = np.array(concat(mx.array(x), grid, window))
    nothing = np.zeros(5, dtype=np.float32)
    for n in range(2):
        cells = loop_cells(x[n], grid, window)
        want = [np.concatenate([nothing if t is None else t for t in cell]) for cell in cells]
        np.testing.assert_array_equal(got[n], np.stack(want))
    if (grid, window) == (27, 3):
        assert got.shape[1] == 81


def test_mean2_rounds_bfloat16_once_and_passes_gradients():
    # In bfloat16 256 + 1 is 256: summed there, the cell's mean would be 64.
    x = mx.array([[[256.0], [1.0], [1.0], [1.0]]], dtype=mx.bfloat16)
    got = mean2(x, 2)
    assert got.dtype == mx.bfloat16
    assert got.item() == 65.0  # 259 / 4 = 64.75, rounded once
    gradient = mx.grad(lambda x: mean2(x, 3).sum())(mx.zeros((1, 9, 1)))
    quarter, half = 0.25, 0.5
    want = [quarter, quarter, half, quarter, quarter, half, half, half, 1.0]
    assert gradient.flatten().tolist() == want


@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_normalised_by_the_patch_weights(bias):
    """As the normalised pixels in float32; in bfloat16 nearer to them than rounded pixels are."""
    config = VisionConfig(
        hidden_size=64,
        num_attention_heads=2,
        image_size=30,
        patch_size=14,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
    )
    mx.random.seed(0)
    patches = PatchEmbedding(config, bias)
    raw = mx.random.randint(0, 256, (2, 30, 30, 3)).astype(mx.uint8)
    pixels = (raw.astype(mx.float32) / 255 - mx.array(config.image_mean)) / mx.array(
        config.image_std
    )
    truth = patches(pixels)
    found = patches(raw)
    assert found.dtype == mx.float32 and mx.abs(found - truth).max().item() < 5e-6
    patches.set_dtype(mx.bfloat16)
    half = patches(raw)
    rounded = patches(pixels.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    assert mx.square(half - truth).sum().item() < mx.square(rounded - truth).sum().item()
