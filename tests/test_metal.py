"""The shapes and kernels where Metal differs from the CPU, at real head dims.

Quick anywhere; worth most on a Mac, where it runs on the GPU. References are written out in numpy.
Tolerances: float32 1e-4 (TF32 off), bfloat16 by direction and by 2e-2 of the largest value.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxvlm.attention import SHORT_QUERIES, SelfAttention, attention

HEAD_DIMS = (64, 72, 128)
LENGTHS = (1, 8, 9, 130)
MASKS = (None, "causal", "bool")
B, H = 2, 2


def inputs(length, dim):
    rng = np.random.default_rng(length * 1000 + dim)
    return [rng.standard_normal((B, H, length, dim), dtype=np.float32) for _ in range(4)]


def bool_mask(length):
    """The second row of the batch ends early, as a padded row does; no query sees nothing."""
    allowed = np.ones((B, 1, length, length), dtype=bool)
    allowed[1, ..., max(1, length // 2) :] = False
    return allowed


def reference(q, k, v, cotangent, scale, allowed):
    """Attention and its gradients in float64: output, dq, dk, dv."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, cotangent))
    scores = np.where(allowed, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = d_out @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale
    d_q, d_k = d_scores @ k, d_scores.swapaxes(-1, -2) @ q
    return weights @ v, d_q, d_k, weights.swapaxes(-1, -2) @ d_out


def run(length, dim, kind, dtype):
    """(found, wanted): output and the three gradients, from MLX and from the reference."""
    q, k, v, cotangent = inputs(length, dim)
    scale = dim**-0.5
    allowed = np.ones((1, 1, length, length), dtype=bool)
    mask: mx.array | str | None = kind
    if kind == "causal":
        allowed = np.tril(allowed)
    elif kind == "bool":
        allowed = bool_mask(length)
        mask = mx.array(allowed)
    arrays = [mx.array(x).astype(dtype) for x in (q, k, v)]
    # What a half type cannot hold is no error of attention's.
    q, k, v = (np.array(x.astype(mx.float32)) for x in arrays)

    def loss(q, k, v):
        out = attention(q, k, v, scale, mask)
        return (out.astype(mx.float32) * mx.array(cotangent)).sum()

    out = attention(*arrays, scale, mask)
    grads = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    found = [np.array(x.astype(mx.float32)) for x in (out, *grads)]
    return found, reference(q, k, v, cotangent, scale, allowed)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_attention_and_its_gradient(dim, length, kind):
    found, wanted = run(length, dim, kind, mx.float32)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_attention_in_bfloat16(dim, length):
    found, wanted = run(length, dim, None, mx.bfloat16)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        if np.abs(b).max() < 1e-6:  # one key: its weight is 1 whatever the query says
            assert np.abs(a).max() < 2e-2, name
            continue
        cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
        assert cosine > 0.999, name
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max(), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [SHORT_QUERIES, 96])
def test_a_resampler_attention_and_its_gradient(queries, masked):
    """More keys than queries, as a resampler has them, with and without views of unlike sizes."""
    rng = np.random.default_rng(queries)
    q, cotangent = (rng.standard_normal((B, H, queries, 128), dtype=np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, H, 130, 128), dtype=np.float32) for _ in range(2))
    there = np.arange(130) < np.array([130, 70 if masked else 130])[:, None, None, None]
    mask = mx.array(there.tolist()) if masked else None

    def loss(q, k, v):
        return (attention(q, k, v, 0.1, mask) * mx.array(cotangent)).sum()

    arrays = [mx.array(x) for x in (q, k, v)]
    found = [attention(*arrays, 0.1, mask), *mx.grad(loss, (0, 1, 2))(*arrays)]
    wanted = reference(q, k, v, cotangent, 0.1, there)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), b, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("length", [1, SHORT_QUERIES, SHORT_QUERIES + 1])
def test_few_queries_avoid_the_short_query_kernel(length, monkeypatch):
    """Metal's short-query kernel has no backward; an array mask keeps MLX off it."""
    masks = []
    real = mx.fast.scaled_dot_product_attention

    def spy(q, k, v, *, scale, mask=None):
        masks.append(mask)
        return real(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    q, k, v, _ = (mx.array(x) for x in inputs(length, 64))
    mx.eval(attention(q, k, v, 0.125))
    assert isinstance(masks[0], mx.array) == (length <= SHORT_QUERIES)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_cross_entropy_and_its_gradient(dtype):
    rng = np.random.default_rng(0)
    rows, vocabulary = 17, 4099
    logits = mx.array(4 * rng.standard_normal((rows, vocabulary), dtype=np.float32)).astype(dtype)
    targets = rng.integers(0, vocabulary, rows)

    def loss(logits):
        # The CPU falls back to plain ops in the logits' type, so they are widened first.
        return mx.fast.cross_entropy(logits.astype(mx.float32), mx.array(targets)).mean()

    value, grad = mx.value_and_grad(loss)(logits)
    x = np.array(logits.astype(mx.float32)).astype(np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert value.item() == pytest.approx(-np.log(p[np.arange(rows), targets]).mean(), rel=1e-4)
    p[np.arange(rows), targets] -= 1
    wanted = p / rows
    error = np.abs(np.array(grad.astype(mx.float32)) - wanted).max()
    assert error <= (1e-4 if dtype == mx.float32 else 2e-2) * np.abs(wanted).max()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_quantized_matmul_equals_the_dequantized(rows, transpose):
    """Forward needs the transposed form; the gradient through frozen 4-bit weights, the other."""
    packed, scales, biases = mx.quantize(mx.random.normal((512, 256)), group_size=64, bits=4)
    plain = mx.dequantize(packed, scales, biases, group_size=64, bits=4)
    x = mx.random.normal((rows, 256 if transpose else 512))

    def quantized(x):
        return mx.quantized_matmul(
            x, packed, scales, biases, transpose=transpose, group_size=64, bits=4
        )

    weight = np.array(plain).T if transpose else np.array(plain)
    wanted = np.array(x) @ weight
    np.testing.assert_allclose(np.array(quantized(x)), wanted, rtol=1e-4, atol=2e-3)
    grad = mx.grad(lambda x: (quantized(x) * mx.array(np.sign(wanted))).sum())(x)
    np.testing.assert_allclose(np.array(grad), np.sign(wanted) @ weight.T, rtol=1e-4, atol=2e-3)


class TwoLayers(nn.Module):
    """Two pre-norm attention layers with dropout, at SigLIP's head dim."""

    def __init__(self, width=144, heads=2):
        super().__init__()
        self.norms = [nn.LayerNorm(width) for _ in range(2)]
        self.layers = [SelfAttention(width, heads) for _ in range(2)]
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.dropout(layer(norm(x)))
        return x


def three_steps(compiled):
    """Losses of three training steps at each of two lengths, from one seed."""
    mx.random.seed(7)
    model = TwoLayers()
    optimizer = optim.AdamW(learning_rate=1e-3)
    mx.eval(model.parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, lambda m, x: (m(x) ** 2).mean())

    def step(x):
        loss, grads = loss_and_grad(model, x)
        optimizer.update(model, grads)
        return loss

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    rng = np.random.default_rng(0)
    losses = []
    for length in (9, 130):
        x = mx.array(rng.standard_normal((2, length, 144), dtype=np.float32))
        for _ in range(3):
            loss = step(x)
            mx.eval(loss, state)
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_step_equals_the_plain_one(everywhere, request):
    """Under mx.compile, weights, moments and dropout's random state all move as they do without.

    The suite turns compilation off on the CPU (conftest.py); the slow form turns it on there too.
    """
    if everywhere and mx.default_device() == mx.cpu:
        mx.enable_compile()
        request.addfinalizer(mx.disable_compile)
    plain, compiled = three_steps(compiled=False), three_steps(compiled=True)
    assert all(math.isfinite(loss) for loss in plain)
    assert len(set(plain)) == len(plain)  # dropout and the optimiser change every step
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)
