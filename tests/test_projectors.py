"""Projectors: sizes, the blocks' arithmetic, pooling, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxvlm.config import ModelConfig, ProjectorConfig, VisionConfig, view_tokens
from mlxvlm.errors import ConfigError
from mlxvlm.projectors.attention import AttentionProjector
from mlxvlm.projectors.build import build_projector
from mlxvlm.projectors.c_abstractor import CAbstractor, DepthwiseConv
from mlxvlm.projectors.mlp import MLPProjector
from mlxvlm.projectors.resampler import Resampler, sincos
from mlxvlm.vision.pooling import adaptive_mean, concat, mean2

VISION = VisionConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=6
)  # a grid of 5
SMALL = ProjectorConfig(hidden_size=12, num_attention_heads=3, intermediate_size=20)
ABSTRACTOR = ProjectorConfig(
    type="c_abstractor", hidden_size=12, num_layers=2, num_query_tokens=9
)  # 5 x 5 to 3 x 3: bins of two and of one in the middle
RESAMPLER = ProjectorConfig(
    type="resampler", hidden_size=12, num_attention_heads=3, num_query_tokens=7
)


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


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, num_positions=25),
        dataclasses.replace(SMALL, type="mlp", pool="mean2"),
        ABSTRACTOR,
        dataclasses.replace(ABSTRACTOR, pool="concat2", num_query_tokens=4),
        RESAMPLER,
        dataclasses.replace(RESAMPLER, pool="mean2"),
    ],
)
def test_every_parameter_learns(config):
    projector = build_projector(config, VISION, 8)
    # As after a first step: at LayerNorm's own start some gradients are almost nothing.
    projector.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), projector.parameters())
    )
    x, target = mx.random.normal((2, 25, 16)), mx.random.normal((8,))
    _, gradients = nn.value_and_grad(projector, lambda x: ((projector(x) - target) ** 2).mean())(x)
    for name, gradient in tree_flatten(gradients):
        if name.endswith("in_proj_bias"):
            gradient = mx.concatenate([gradient[:12], gradient[24:]])
        if not name.endswith("k_proj.bias"):  # softmax does not see a key bias
            assert (gradient != 0).all().item() and mx.abs(gradient).max().item() > 1e-5, name


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


def test_sizes_of_the_published_abstractor_and_resampler():
    resampler = build_projector(ProjectorConfig(type="resampler"), VisionConfig(), 4096)
    assert size(resampler) == 89_038_848 and resampler.attn.num_heads == 32  # 89.0 M, MiniCPM-V's
    shapes = {name: p.shape for name, p in tree_flatten(resampler.parameters())}
    norms = {f"{n}.{k}": (4096,) for n in ("ln_q", "ln_kv", "ln_post") for k in ("weight", "bias")}
    assert shapes == norms | {
        "query": (96, 4096),
        "kv_proj.weight": (4096, 1152),
        "attn.in_proj_weight": (3 * 4096, 4096),
        "attn.in_proj_bias": (3 * 4096,),
        "attn.out_proj.weight": (4096, 4096),
        "attn.out_proj.bias": (4096,),
        "proj": (4096, 4096),
    }
    clip = dataclasses.replace(VisionConfig(), hidden_size=1024, image_size=336)
    abstractor = build_projector(ProjectorConfig(type="c_abstractor"), clip, 4096)
    assert isinstance(abstractor, CAbstractor) and abstractor.side == 12
    block = 2 * 1024**2 + 9 * 1024 + 3 * 2 * 1024 + 2 * 1024 * 256 + 1024 + 256
    assert [size(b) for b in (*abstractor.stage1, *abstractor.stage2)] == [block] * 6
    readout = 1024 * 4096 + 4096**2 + 2 * 4096
    assert size(abstractor) == 6 * block + readout + 576 * 1024
    # SigLIP's 1152 channels: a first block that changes the width, its squeeze by what comes in.
    wide = build_projector(ProjectorConfig(type="c_abstractor"), VisionConfig(), 4096)
    assert isinstance(wide, CAbstractor)
    assert wide.stage1[0].se.fc1.weight.shape == (288, 1024)
    assert wide.stage1[0].shortcut_conv.weight.shape == (1024, 1152)
    same = build_projector(RESAMPLER, dataclasses.replace(VISION, hidden_size=12), 8)
    assert "kv_proj" not in same and same.proj.shape == (12, 8)


@pytest.mark.parametrize("pool", ["none", "mean2", "concat2"])
@pytest.mark.parametrize("config", [ABSTRACTOR, RESAMPLER])
def test_so_many_tokens_whatever_the_grid(config, pool):
    config = dataclasses.replace(config, pool=pool)
    for patches in (5, 6, 8):
        vision = dataclasses.replace(VISION, image_size=6 * patches)
        projector = build_projector(config, vision, 8)
        x = mx.random.normal((3, patches**2, 16))
        got = projector(x)
        assert got.shape == (3, view_tokens(vision, config), 8)
        assert mx.isfinite(got).all().item()
        if pool == "mean2":  # a cache may hold them pooled already
            assert mx.array_equal(got, projector(mean2(x, patches)))
    assert view_tokens(vision, SMALL) == 64


@pytest.mark.parametrize("config", [ABSTRACTOR, RESAMPLER])
def test_every_token_knows_every_patch_of_its_own_view_alone(config):
    projector = build_projector(config, VISION, 8)
    x = mx.random.normal((3, 25, 16))
    alone = mx.concatenate([projector(x[i : i + 1]) for i in range(3)])
    assert difference(projector(x), alone) < 1e-6
    for place in (0, 12, 24):
        poke = np.zeros((3, 25, 16), dtype=np.float32)
        poke[1, place, ::2] = 1
        before, after = projector(x), projector(x + mx.array(poke))
        assert mx.array_equal(before[0], after[0]) and mx.array_equal(before[2], after[2])
        # At five patches a side, two depths of two blocks reach from corner to corner.
        assert mx.abs(before[1] - after[1]).max(axis=-1).min().item() > 1e-7


@pytest.mark.parametrize("config", [ABSTRACTOR, RESAMPLER])
def test_places_count(config):
    """The same patches elsewhere are another picture, to an abstractor and to a resampler."""
    projector = build_projector(config, VISION, 8)
    x = mx.random.normal((1, 25, 16))
    turned = x.reshape(1, 5, 5, 16).transpose(0, 2, 1, 3).reshape(1, 25, 16)
    assert difference(projector(x), projector(turned)) > 1e-5


@pytest.mark.parametrize("config", [ABSTRACTOR, RESAMPLER])
def test_half_precision_follows(config):
    projector = build_projector(config, VISION, 8)
    x = mx.random.normal((2, 25, 16))
    want = projector(x)
    projector.set_dtype(mx.bfloat16)
    got = projector(x.astype(mx.bfloat16))
    assert got.dtype == mx.bfloat16
    got = got.astype(mx.float32)
    assert (got * want).sum() / mx.sqrt((got**2).sum() * (want**2).sum()) > 0.999


@pytest.mark.parametrize("shape", [(27, 27), (5, 5), (7, 4), (3, 9), (12, 12)])
@pytest.mark.parametrize("side", [1, 3, 4, 12])
def test_adaptive_mean(shape, side):
    """Each bin written out, also where none divides, and where there are more than patches."""
    x = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    got = np.array(adaptive_mean(mx.array(x), side))
    assert got.shape == (2, side, side, 3)
    for i in range(side):
        for j in range(side):
            rows, columns = (
                slice(math.floor(at * n / side), math.ceil((at + 1) * n / side))
                for at, n in zip((i, j), shape, strict=True)
            )
            want = x[:, rows, columns].astype(np.float64).mean(axis=(1, 2))
            np.testing.assert_allclose(got[:, i, j], want, atol=1e-6)


def test_depthwise_convolution_and_its_gradients_are_mlx_own():
    conv = DepthwiseConv(8)
    x, cotangent = mx.random.normal((2, 4, 5, 8)), mx.random.normal((2, 4, 5, 8))

    def ours(x, w):
        conv.weight = w
        return (conv(x) * cotangent).sum()

    def mlx_own(x, w):
        return (mx.conv2d(x, w, padding=1, groups=8) * cotangent).sum()

    weight = mx.array(conv.weight)
    assert difference(conv(x), mx.conv2d(x, weight, padding=1, groups=8)) < 1e-6
    for a, b in zip(
        mx.grad(ours, (0, 1))(x, weight), mx.grad(mlx_own, (0, 1))(x, weight), strict=True
    ):
        assert difference(a, b) < 1e-5


def test_sincos_says_column_then_row():
    table = sincos(3, 4, 8)
    assert table.shape == (12, 8) and table.dtype == np.float32
    for row in range(3):
        for column in range(4):
            want = [
                wave(place / 10000 ** (i / 2))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(2)
            ]
            np.testing.assert_allclose(table[4 * row + column], want, atol=1e-7)


def test_a_resampler_takes_views_of_different_grids():
    """Each padded view gives what it gives alone, whatever the padding holds."""
    projector = build_projector(RESAMPLER, VISION, 8)
    assert isinstance(projector, Resampler)
    sizes = [(2, 6), (5, 5), (6, 2), (1, 3)]
    views = [mx.random.normal((1, h * w, 16)) for h, w in sizes]
    alone = [projector(view, [grid]) for view, grid in zip(views, sizes, strict=True)]
    assert difference(alone[1], projector(views[1])) < 1e-6  # the encoder's own grid
    assert difference(projector(views[0], [(6, 2)]), alone[0]) > 1e-4
    for filling in (0.0, 100.0):
        padded = [
            mx.pad(v, [(0, 0), (0, 25 - v.shape[1]), (0, 0)], constant_values=filling)
            for v in views
        ]
        got = projector(mx.concatenate(padded), sizes)
        assert difference(got, mx.concatenate(alone)) < 1e-5
    for sizes, told in (([(5, 6)], "views of 5 x 6 tokens, but .* have 25"), ([(2, 2)], "2 x 2")):
        with pytest.raises(ConfigError, match=told):
            projector(views[1], sizes)


def test_what_an_abstractor_or_a_resampler_cannot_be_is_refused():
    clip = dataclasses.replace(VISION, model_type="clip_vision_model")
    for config in (ABSTRACTOR, RESAMPLER):
        with pytest.raises(ConfigError, match=f"'{config.type}' needs the whole square grid"):
            build_projector(config, clip, 8)
        projector = build_projector(config, VISION, 8)
        with pytest.raises(ConfigError, match="5 x 5.* have 24"):
            projector(mx.zeros((1, 24, 16)))
        with pytest.raises(ConfigError, match=r"num_query_tokens \(=-4\) must be at least 1"):
            dataclasses.replace(config, num_query_tokens=-4)
    with pytest.raises(ConfigError, match=r"\(=12\) must be a square number .*: 9 or 16"):
        dataclasses.replace(ABSTRACTOR, num_query_tokens=12)
    with pytest.raises(ConfigError, match=r"\(=16\) must be at most 9"):
        build_projector(
            dataclasses.replace(ABSTRACTOR, num_query_tokens=16, pool="mean2"), VISION, 8
        )
    with pytest.raises(ConfigError, match=r"width \(=12\) .* num_attention_heads \(=5\)"):
        build_projector(dataclasses.replace(RESAMPLER, num_attention_heads=5), VISION, 8)
    with pytest.raises(ConfigError, match=r"width \(=6\) must be divisible by 4"):
        build_projector(dataclasses.replace(RESAMPLER, hidden_size=6), VISION, 8)
    with pytest.raises(ConfigError, match=r"num_query_tokens \(=9\) must be 0 for 'mlp'"):
        ProjectorConfig(type="mlp", num_query_tokens=9)


@pytest.mark.parametrize("kind", ["attention", "mlp", "c_abstractor", "resampler"])
def test_a_config_keeps_what_its_defaults_were(kind):
    config = ModelConfig(projector=ProjectorConfig(type=kind))
    raw = config.to_dict()["projector"]
    assert ModelConfig.from_dict(config.to_dict()).projector == config.projector
    assert raw["num_layers"] == (3 if kind == "c_abstractor" else 2)
    assert raw["hidden_act"] == ("silu" if kind == "c_abstractor" else "gelu")
    assert raw["num_query_tokens"] == {"c_abstractor": 144, "resampler": 96}.get(kind, 0)
    assert config.tokens_per_view == (raw["num_query_tokens"] or 729)
