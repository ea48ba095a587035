"""The abstractor and the resampler against torch, written out from the papers' formulas.

Outputs and gradients, of every parameter and of the input, at 1e-4.
"""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.config import ProjectorConfig, VisionConfig
from mlxvlm.projectors.build import build_projector
from mlxvlm.projectors.resampler import Resampler

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

ABSTRACTOR = ProjectorConfig(
    type="c_abstractor", hidden_size=24, num_layers=3, num_query_tokens=144
)
RESAMPLER = ProjectorConfig(
    type="resampler", hidden_size=48, num_attention_heads=3, num_query_tokens=10
)


def vision(patches: int, width: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=14 * patches,
        patch_size=14,
    )


def drawn(projector: nn.Module) -> nn.Module:
    """Every parameter, biases and norms too, so that none can be dropped unnoticed."""
    rng = np.random.default_rng(3)
    for name, p in tree_flatten(projector.parameters()):
        fan = p[0].size if p.ndim > 1 else 4
        value = rng.standard_normal(p.shape, dtype=np.float32) * (1 / fan) ** 0.5
        if p.ndim == 1 and name.endswith("weight"):
            value = value + 1
        projector.load_weights([(name, mx.array(value))], strict=False)
    return projector


def to_torch(projector: nn.Module) -> dict:
    return {
        name: torch.from_numpy(np.array(p)).requires_grad_()
        for name, p in tree_flatten(projector.parameters())
    }


def compare(projector, formula, x: np.ndarray, *given) -> None:
    """Ours(x, *given) and formula(parameters, x): outputs and all gradients."""
    p = to_torch(projector)
    features = torch.from_numpy(x).requires_grad_()
    want = formula(p, features)
    cotangent = np.random.default_rng(5).standard_normal(want.shape, dtype=np.float32)
    want.backward(torch.from_numpy(cotangent))

    def loss(parameters, x):
        projector.update(parameters)
        return (projector(x, *given) * mx.array(cotangent)).sum()

    got = projector(mx.array(x), *given)
    np.testing.assert_allclose(np.array(got), want.detach().numpy(), atol=1e-4)
    found, to_x = mx.grad(loss, (0, 1))(projector.parameters(), mx.array(x))
    gradients = {**dict(tree_flatten(found)), "": to_x}
    assert gradients.keys() == {*p, ""}
    for name, tensor in {**p, "": features}.items():
        wanted = tensor.grad.numpy()
        error = np.abs(np.array(gradients[name]) - wanted).max()
        assert error <= 1e-4 * max(1, np.abs(wanted).max()), (name, error)


def abstractor(p: dict, x, side: int):
    """Channels first, with torch's own convolutions and pooling."""
    F = torch.nn.functional
    N, T, C = x.shape
    grid = math.isqrt(T)

    def pointwise(name, x):
        return F.conv2d(x, p[f"{name}.weight"][:, :, None, None])

    def norm(name, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-6)
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def block(at, x):
        y = F.silu(norm(f"{at}.norm1", pointwise(f"{at}.conv1", x)))
        kernel = p[f"{at}.conv2.weight"].permute(0, 3, 1, 2)
        y = F.conv2d(y, kernel, padding=1, groups=kernel.shape[0])
        y = F.silu(norm(f"{at}.norm2", y))
        s = F.adaptive_avg_pool2d(y, 1)[:, :, 0, 0]
        s = F.silu(F.linear(s, p[f"{at}.se.fc1.weight"], p[f"{at}.se.fc1.bias"]))
        s = torch.sigmoid(F.linear(s, p[f"{at}.se.fc2.weight"], p[f"{at}.se.fc2.bias"]))
        y = norm(f"{at}.norm3", pointwise(f"{at}.conv3", y * s[:, :, None, None]))
        if f"{at}.shortcut_conv.weight" in p:
            x = norm(f"{at}.shortcut_norm", pointwise(f"{at}.shortcut_conv", x))
        return F.silu(x + y)

    x = x + p["position_embedding.weight"][None]
    x = x.transpose(1, 2).reshape(N, C, grid, grid)
    for i in range(3):
        x = block(f"stage1.{i}", x)
    x = F.adaptive_avg_pool2d(x, (side, side))
    for i in range(3):
        x = block(f"stage2.{i}", x)
    x = x.flatten(2).transpose(1, 2)
    x = F.silu(F.linear(x, p["linear_1.weight"], p["linear_1.bias"]))
    return F.linear(x, p["linear_2.weight"], p["linear_2.bias"])


@pytest.mark.parametrize("width", [24, 20])  # the abstractor's own, and one that it must change
@pytest.mark.parametrize(("patches", "tokens"), [(27, 144), (16, 144), (24, 64), (5, 9)])
def test_abstractor(patches, tokens, width):
    config = dataclasses.replace(ABSTRACTOR, num_query_tokens=tokens)
    projector = drawn(build_projector(config, vision(patches, width), 16))
    x = np.random.default_rng(1).standard_normal((2, patches**2, width), dtype=np.float32)
    compare(projector, lambda p, x: abstractor(p, x, math.isqrt(tokens)), x)


def resampler(p: dict, x, sizes, heads: int):
    """torch.nn.MultiheadAttention over keys with places; a view at a time, its padding cut off."""
    F = torch.nn.functional
    D = p["query"].shape[1]

    def norm(name, x):
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    attention = torch.nn.MultiheadAttention(D, heads, batch_first=True)
    names = [name for name, _ in attention.named_parameters()]
    out = []
    for view, (h, w) in zip(x, sizes, strict=True):
        places = torch.zeros(h * w, D)
        for k in range(h * w):
            for i in range(D // 4):
                rate = 10000 ** (-i / (D // 4))
                for half, place in enumerate((k % w, k // w)):
                    places[k, half * D // 2 + i] = math.sin(place * rate)
                    places[k, half * D // 2 + D // 4 + i] = math.cos(place * rate)
        kv = view[: h * w]
        if "kv_proj.weight" in p:
            kv = kv @ p["kv_proj.weight"].T
        kv = norm("ln_kv", kv)[None]
        inside = {name: p[f"attn.{name}"] for name in names}
        query = norm("ln_q", p["query"])[None]
        seen, _ = torch.func.functional_call(attention, inside, (query, kv + places, kv))
        out.append(norm("ln_post", seen[0]) @ p["proj"])
    return torch.stack(out)


@pytest.mark.parametrize("width", [48, 40])  # 48: no kv_proj
@pytest.mark.parametrize("queries", [10, 3])  # 3: few enough for Metal's other kernel
def test_resampler(queries, width):
    config = dataclasses.replace(RESAMPLER, num_query_tokens=queries)
    projector = drawn(build_projector(config, vision(7, width), 32))
    assert isinstance(projector, Resampler)
    x = np.random.default_rng(2).standard_normal((3, 49, width), dtype=np.float32)
    compare(projector, lambda p, x: resampler(p, x, [(7, 7)] * 3, 3), x)
    sizes = [(4, 9), (7, 7), (12, 1)]
    compare(projector, lambda p, x: resampler(p, x, sizes, 3), x, sizes)
    compare(projector, lambda p, x: resampler(p, x, [(4, 9)] * 3, 3), x[:, :36], [(4, 9)] * 3)
