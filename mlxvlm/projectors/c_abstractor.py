"""Honeybee's C-Abstractor: convolutions around an adaptive average pooling.

Cha et al. 2023, https://arxiv.org/abs/2312.06742; MM1 and MM1.5 chose it too. Neighbours mix before
and after the pooling, so that fewer tokens keep what is where.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..config import ProjectorConfig
from ..errors import ConfigError
from ..vision.blocks import activation
from ..vision.pooling import adaptive_mean
from .pool import Pool

DEFAULT_WIDTH = 1024


class DepthwiseConv(nn.Module):
    """3x3 over each channel by itself, zeros beyond the edges, no bias: [N, H, W, C] -> the same.

    `weight` has MLX's convolution layout, [C, 3, 3, 1]. Nine shifted products in place of a grouped
    convolution, whose gradients are slow or special on some backends.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.random.uniform(-1 / 3, 1 / 3, (channels, 3, 3, 1))

    def __call__(self, x: mx.array) -> mx.array:
        _, H, W, _ = x.shape
        # Half precision would round eight times on the way.
        weight = self.weight.astype(mx.float32)
        around = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        taps = [
            around[:, i : i + H, j : j + W] * weight[:, i, j, 0] for i in range(3) for j in range(3)
        ]
        return sum(taps[1:], taps[0]).astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Each channel times a gate that its view's means decide (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int, act: str):
        super().__init__()
        self.act = activation(act)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def __call__(self, x: mx.array) -> mx.array:
        means = x.astype(mx.float32).mean(axis=(1, 2), keepdims=True).astype(x.dtype)
        return x * mx.sigmoid(self.fc2(self.act(self.fc1(means))))


class ResBlock(nn.Module):
    """RegNet's bottleneck (Radosavovic et al. 2020) at bottleneck ratio 1 with a channel a group.

    act(shortcut(x) + norm3(conv3(se(act(norm2(conv2(act(norm1(conv1(x))))))))): conv1 and conv3
    look at a place, conv2 at its neighbours too. [N, H, W, C] -> [N, H, W, width]
    """

    def __init__(self, channels: int, width: int, act: str, eps: float):
        super().__init__()
        self.act = activation(act)
        self.conv1 = nn.Linear(channels, width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.conv2 = DepthwiseConv(width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.se = SqueezeExcite(width, max(1, round(channels / 4)), act)
        self.conv3 = nn.Linear(width, width, bias=False)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        if channels != width:
            self.shortcut_conv = nn.Linear(channels, width, bias=False)
            self.shortcut_norm = nn.LayerNorm(width, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.se(self.act(self.norm2(self.conv2(y))))
        y = self.norm3(self.conv3(y))
        if "shortcut_conv" in self:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return self.act(x + y)


class CAbstractor(nn.Module):
    """[N, T, Dv] -> [N, num_query_tokens, Dl]; a view is a row, so views never see each other.

    pool, + learned positions, `num_layers` blocks, adaptive mean, `num_layers` blocks, Linear,
    activation, Linear.
    """

    def __init__(self, config: ProjectorConfig, vision_width: int, language_width: int, grid: int):
        super().__init__()
        width = config.hidden_size or DEFAULT_WIDTH
        self.pool = Pool(config.pool, grid)
        self.side = math.isqrt(config.num_query_tokens)
        if self.side > self.pool.side:
            raise ConfigError(
                f"projector.num_query_tokens (={config.num_query_tokens}) must be at most "
                f"{self.pool.tokens}, the tokens of a view before the abstractor pools them."
            )
        channels = vision_width * self.pool.factor
        self.position_embedding = nn.Embedding(self.pool.tokens, channels)
        self.position_embedding.weight = 0.02 * mx.random.truncated_normal(
            -2, 2, (self.pool.tokens, channels)
        )

        def stage(channels: int) -> list[ResBlock]:
            return [
                ResBlock(width if i else channels, width, config.hidden_act, config.layer_norm_eps)
                for i in range(config.num_layers)
            ]

        self.stage1 = stage(channels)
        self.stage2 = stage(width)
        self.act = activation(config.hidden_act)
        self.linear_1 = nn.Linear(width, language_width)
        self.linear_2 = nn.Linear(language_width, language_width)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.pool(x)
        side = self.pool.side
        if x.shape[1] != side**2:
            raise ConfigError(
                f"the projector takes {side**2} tokens a view ({side} x {side}), but the features "
                f"have {x.shape[1]}."
            )
        x = (x + self.position_embedding.weight).reshape(x.shape[0], side, side, -1)
        for block in self.stage1:
            x = block(x)
        x = adaptive_mean(x, self.side)
        for block in self.stage2:
            x = block(x)
        return self.linear_2(self.act(self.linear_1(x.reshape(x.shape[0], self.side**2, -1))))
