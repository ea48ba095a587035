"""LLaVA's projector: Linear, GELU, Linear; and InternVL's, with a LayerNorm in front."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import ProjectorConfig
from ..vision.blocks import activation
from .pool import Pool


class MLPProjector(nn.Module):
    """[N, T, Dv] -> [N, T', Dl], each token by itself.

    The hidden width is `hidden_size`; 0 means the language model's, as LLaVA has it.
    """

    def __init__(self, config: ProjectorConfig, vision_width: int, language_width: int, grid: int):
        super().__init__()
        self.pool = Pool(config.pool, grid)
        width = config.hidden_size or language_width
        self.act = activation(config.hidden_act)
        if config.layer_norm:
            width_in = vision_width * self.pool.factor
            self.layer_norm = nn.LayerNorm(width_in, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(vision_width * self.pool.factor, width, bias=config.bias)
        self.linear_2 = nn.Linear(width, language_width, bias=config.bias)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.pool(x)
        if "layer_norm" in self:
            x = self.layer_norm(x)
        return self.linear_2(self.act(self.linear_1(x)))
