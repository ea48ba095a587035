"""Projectors: sizes, the blocks' arithmetic, pooling, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.config import ProjectorConfig, VisionConfig
from mlxvlm.errors import ConfigError
from mlxvlm.projectors.attention import AttentionProjector
from mlxvlm.projectors.build import build_projector
from mlxvlm.projectors.mlp import MLPProjector
from mlxvlm.vision.pooling import concat, mean2

VISION = VisionConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=6
)  # a grid of 5
SMALL = ProjectorConfig(hidden_size=12, num_attention_heads=3, intermediate_size=20)


def size(module: nn.Module) -> int:
    return sum(p.size for _, p in tree_flatten(module.parameters()))


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


def test_sizes_for_so400m_and_llama_3_8b():
    projector = build_projector(ProjectorConfig(), VisionConfig(), 4096)
    assert isinstance(projector, AttentionProjector)
    assert sum(size(block) for block in projector.layers) == 31_880_448  # 31.9 M
    assert size(projector.out_proj) == 1152 * 4096 + 4096  # 4.72 M
    assert size(projector.in_proj) == 1152 * 1152 + 1152
    assert projector.layers[0].attention.num_heads == 18
    assert not any("position" in name for name, _ in tree_flatten(projector.parameters()))

    wide = build_projector(ProjectorConfig(hidden_size=4096), VisionConfig(), 4096)
    assert isinstance(wide, AttentionProjector)
    assert sum(size(block) for block in wide.layers) == 402_759_680  # 402.8 M

    clip = dataclasses.replace(VisionConfig(), hidden_size=1024)
    assert size(build_projector(ProjectorConfig(type="mlp"), clip, 4096)) == 20_979_712
    assert size(build_projector(ProjectorConfig(type="mlp"), clip, 5120)) == 31_467_520


def test_parameter_names():
    projector = build_projector(dataclasses.replace(SMALL, num_positions=25), VISION, 8)
    names = {name for name, _ in tree_flatten(projector.parameters())}
    linears = [f"attention.{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    modules = ["in_proj", "norm", "out_proj"] + [
        f"layers.{i}.{m}" for i in range(2) for m in ["norm1", "norm2", *linears]
    ]
    want = {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    assert names == want | {"position_embedding.weight"}
    mlp = build_projector(ProjectorConfig(type="mlp", bias=False), VISION, 8)
    assert {n for n, _ in tree_flatten(mlp.parameters())} == {"linear_1.weight", "linear_2.weight"}


def reference(p: dict[str, np.ndarray], x: np.ndarray, layers: int, heads: int) -> np.ndarray:
    """The attention projector for one view [T, Dv], in float64, an attention row at a time."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = linear("in_proj", x) + p["position_embedding.weight"]
    T, D = x.shape
    d = D // heads
    for i in range(layers):
        at = f"layers.{i}."
        y = norm(at + "norm1", x)
        q, k, v = (linear(f"{at}attention.{n}_proj", y) for n in "qkv")
        mixed = np.zeros((T, D))
        for h in range(heads):
            part = slice(h * d, h * d + d)
            for t in range(T):
                score = k[:, part] @ q[t, part] / math.sqrt(d)
                weight = np.exp(score - score.max())
                mixed[t, part] = weight / weight.sum() @ v[:, part]
        x = x + linear(at + "attention.out_proj", mixed)
        y = linear(at + "mlp.fc1", norm(at + "norm2", x))
        y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + linear(at + "mlp.fc2", y)
    return linear("out_proj", norm("norm", x))


def test_attention_projector_equals_its_formula():
    mx.random.seed(1)
    projector = build_projector(dataclasses.replace(SMALL, num_positions=25), VISION, 8)
    drawn = [
        (name, p + mx.random.normal(p.shape) * 0.3)
        for name, p in tree_flatten(projector.parameters())
    ]
    projector.load_weights(drawn)
    x = mx.random.normal((2, 25, 16))
    got = np.array(projector(x))
    p = {name: np.array(value, dtype=np.float64) for name, value in drawn}
    for n in range(2):
        want = reference(p, np.array(x[n], dtype=np.float64), 2, 3)
        np.testing.assert_allclose(got[n], want, atol=1e-5)


def test_mlp_projector_equals_its_formula():
    projector = build_projector(ProjectorConfig(type="mlp"), VISION, 8)
    assert isinstance(projector, MLPProjector)
    x = np.random.default_rng(0).normal(size=(2, 25, 16))
    p = {k: np.array(v, dtype=np.float64) for k, v in tree_flatten(projector.parameters())}
    y = x @ p["linear_1.weight"].T + p["linear_1.bias"]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    want = y @ p["linear_2.weight"].T + p["linear_2.bias"]
    np.testing.assert_allclose(np.array(projector(mx.array(x.astype(np.float32)))), want, atol=1e-5)


def test_blocks_attend_both_ways_within_a_view_and_never_across():
    projector = build_projector(SMALL, VISION, 8)
    x = mx.random.normal((2, 25, 16))
    for place in (0, 24):
        poke = np.zeros((2, 25, 16), dtype=np.float32)
        poke[1, place, ::2] = 1  # uneven, because a LayerNorm does not see an even shift
        before, after = projector(x), projector(x + mx.array(poke))
        assert mx.array_equal(before[0], after[0])
        assert mx.abs(before[1] - after[1]).max(axis=-1).min().item() > 1e-6


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize(
    "pool, tokens", [("none", 25), ("mean2", 9), ("concat2", 9), ("concat3", 4)]
)
def test_pools(kind, pool, tokens):
    config = dataclasses.replace(SMALL, type=kind, pool=pool)
    projector = build_projector(config, VISION, 8)
    x = mx.random.normal((2, 25, 16))
    got = projector(x)
    assert got.shape == (2, tokens, 8)
    pooled = {"none": x, "mean2": mean2(x, 5)}.get(pool)
    pooled = concat(x, 5, int(pool[-1])) if pooled is None else pooled
    unpooled = build_projector(
        dataclasses.replace(config, pool="none"),
        dataclasses.replace(VISION, hidden_size=pooled.shape[-1]),
        8,
    )
    unpooled.update(projector.parameters())
    assert difference(got, unpooled(pooled)) < 1e-6


def test_features_pooled_in_the_cache_are_not_pooled_again():
    projector = build_projector(dataclasses.replace(SMALL, pool="mean2"), VISION, 8)
    x = mx.random.normal((2, 25, 16))
    assert mx.array_equal(projector(x), projector(mean2(x, 5)))
    with pytest.raises(ConfigError, match="25 tokens a view .* or 9 already pooled ones.* have 24"):
        projector(x[:, :24])
    side_by_side = build_projector(dataclasses.replace(SMALL, pool="concat3"), VISION, 8)
    with pytest.raises(ConfigError, match="takes 25 tokens a view"):
        side_by_side(x[:, :4])


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, type="mlp", pool="mean2")])
def test_every_parameter_learns(config):
    vision = dataclasses.replace(VISION)
    config = dataclasses.replace(config, num_positions=25 if config.type == "attention" else 0)
    projector = build_projector(config, vision, 8)
    x, target = mx.random.normal((2, 25, 16)), mx.random.normal((8,))
    _, gradients = nn.value_and_grad(projector, lambda x: ((projector(x) - target) ** 2).mean())(x)
    for name, gradient in tree_flatten(gradients):
        if not name.endswith("k_proj.bias"):  # softmax does not see a key bias
            assert mx.abs(gradient).max().item() > 1e-7, name


def test_a_fresh_stack_starts_near_a_linear_map():
    mx.random.seed(0)
    vision = dataclasses.replace(VISION, hidden_size=64)
    shares = []
    for layers in (2, 8):
        projector = build_projector(ProjectorConfig(num_layers=layers), vision, 8)
        assert isinstance(projector, AttentionProjector)
        x = projector.in_proj(mx.random.normal((2, 25, 64)))
        y = x
        for layer in projector.layers:
            y = layer(y)
        shares.append((mx.linalg.norm(y - x) / mx.linalg.norm(x)).item())
    assert all(0.01 < share < 1 for share in shares), shares


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match=r"width \(=12\).*num_attention_heads \(=5\)"):
        build_projector(dataclasses.replace(SMALL, num_attention_heads=5), VISION, 8)
    with pytest.raises(ConfigError, match=r"num_positions \(=24\) must be 0 or 25"):
        build_projector(dataclasses.replace(SMALL, num_positions=24), VISION, 8)
    with pytest.raises(ConfigError, match=r"num_positions \(=25\) must be 0 or 9"):
        build_projector(dataclasses.replace(SMALL, num_positions=25, pool="mean2"), VISION, 8)
    with pytest.raises(ConfigError, match="hidden_act"):
        build_projector(dataclasses.replace(SMALL, hidden_act="swish2"), VISION, 8)
    clip = dataclasses.replace(VISION, model_type="clip_vision_model")
    with pytest.raises(ConfigError, match="needs the whole square grid"):
        build_projector(dataclasses.replace(SMALL, pool="mean2"), clip, 8)
    # With the class token kept, positions count it too.
    projector = build_projector(dataclasses.replace(SMALL, num_positions=26), clip, 8)
    assert projector(mx.zeros((1, 26, 16))).shape == (1, 26, 8)
    with pytest.raises(ConfigError, match="26 positions, but a view has 25 tokens"):
        projector(mx.zeros((1, 25, 16)))
