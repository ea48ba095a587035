"""The pre-norm transformer block that SigLIP, CLIP and the attention projector share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import SelfAttention
from ..errors import ConfigError


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), which OpenAI's CLIP was trained with."""
    return x * mx.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The function that transformers calls `name`."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act (={name!r}) must be one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """fc1, activation, fc2: [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, bias: bool = True):
        super().__init__()
        self.act = activation(act)
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """A branch of a block that training leaves out at random, for each row by itself: stochastic
    depth (Huang et al. 2016). What is kept is scaled up, so that the mean stays.

    rate: the share of rows that lose the branch, 0 until `set_drop_path` says more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def __call__(self, branch: mx.array) -> mx.array:
        """[N, ...] -> [N, ...]; itself, unless in training."""
        if not self.training or not self.rate:
            return branch
        shape = (branch.shape[0], *[1] * (branch.ndim - 1))
        kept = mx.random.bernoulli(1 - self.rate, shape).astype(branch.dtype)
        return branch * (kept / (1 - self.rate))


def set_drop_path(tower: Any, rate: float) -> None:
    """Rates of a tower's blocks: 0 in the first, then evenly up to `rate` in the last of its
    config's layers, as in timm."""
    last = max(1, tower.config.num_hidden_layers - 1)
    for number, layer in enumerate(tower.encoder.layers):
        layer.drop_path.rate = rate * number / last


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), every token seeing every token of its row."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, act: str, eps: float
    ):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.self_attn = SelfAttention(hidden_size, num_heads)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = MLP(hidden_size, intermediate_size, act)
        self.drop_path = DropPath()

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.drop_path(self.self_attn(self.layer_norm1(x)))
        return x + self.drop_path(self.mlp(self.layer_norm2(x)))


class Blocks(nn.Module):
    """A stack of `EncoderLayer`, under Hugging Face's name `encoder.layers`."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        act: str,
        eps: float,
    ):
        super().__init__()
        self.layers = [
            EncoderLayer(hidden_size, num_heads, intermediate_size, act, eps)
            for _ in range(num_layers)
        ]

    def __call__(self, x: mx.array, upto: int | None = None) -> mx.array:
        """Runs the first `upto` blocks, or all."""
        for layer in self.layers[:upto]:
            x = layer(x)
        return x


def layer_number(name: str) -> int | None:
    """The block that a tensor named `encoder.layers.N...` belongs to, else None."""
    if not name.startswith("encoder.layers."):
        return None
    number = name.split(".")[2]
    return int(number) if number.isdecimal() else None
