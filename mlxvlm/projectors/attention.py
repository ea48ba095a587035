"""Llama3-V's projector: self-attention blocks between the encoder and the language model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..attention import SelfAttention
from ..config import ProjectorConfig
from ..errors import ConfigError
from ..vision.blocks import MLP
from .pool import Pool


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); each token sees all of its own view."""

    def __init__(self, config: ProjectorConfig, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(width, heads, bias=config.bias)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        intermediate = config.intermediate_size or 4 * width
        self.mlp = MLP(width, intermediate, config.hidden_act, bias=config.bias)
        # Small residual steps at first: the stack starts near a linear map, whatever its depth.
        shrink = (2 * config.num_layers) ** -0.5
        for linear in (self.attention.out_proj, self.mlp.fc2):
            linear.weight = linear.weight * shrink

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionProjector(nn.Module):
    """[N, T, Dv] -> [N, T', Dl]; a view is a row, so views never see each other.

    pool, Linear (+ positions), `num_layers` blocks, norm, Linear.
    `tokens` is how many each view brings after pooling, where that is not the pooled grid (a class
    token).
    """

    def __init__(
        self,
        config: ProjectorConfig,
        vision_width: int,
        language_width: int,
        grid: int,
        tokens: int | None = None,
    ):
        super().__init__()
        width = config.hidden_size or vision_width
        heads = config.num_attention_heads or max(1, width // 64)
        if width % heads:
            raise ConfigError(
                f"the projector's width (={width}) must be divisible by its "
                f"num_attention_heads (={heads}): set projector.num_attention_heads."
            )
        self.pool = Pool(config.pool, grid)
        tokens = tokens or self.pool.tokens
        if config.num_positions not in (0, tokens):
            raise ConfigError(
                f"projector.num_positions (={config.num_positions}) must be 0 or {tokens}, "
                "the tokens of one view after pooling."
            )
        self.in_proj = nn.Linear(vision_width * self.pool.factor, width, bias=config.bias)
        if config.num_positions:
            self.position_embedding = nn.Embedding(tokens, width)
        self.layers = [Block(config, width, heads) for _ in range(config.num_layers)]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(width, language_width, bias=config.bias)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.in_proj(self.pool(x))
        if "position_embedding" in self:
            if x.shape[1] != self.position_embedding.weight.shape[0]:
                raise ConfigError(
                    f"the projector has {self.position_embedding.weight.shape[0]} positions, "
                    f"but a view has {x.shape[1]} tokens."
                )
            x = x + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.out_proj(self.norm(x))
