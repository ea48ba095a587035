"""Pixels to patch embeddings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from ..errors import PictureError


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: [N, S, S, C] -> [N, g*g, D].

    The grid is floor(S / P) patches a side, in rows; what is left at the right and bottom is unused
    (384 at 14: 27 patches and 6 pixels). `weight` keeps MLX's convolution layout, [D, P, P, C].
    """

    def __init__(self, config: VisionConfig, bias: bool = True):
        super().__init__()
        D, P, C = config.hidden_size, config.patch_size, config.num_channels
        self.image_size = config.image_size
        bound = (P * P * C) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (D, P, P, C))
        if bias:
            self.bias = mx.zeros((D,))

    def __call__(self, pixels: mx.array) -> mx.array:
        D, P, _, C = self.weight.shape
        S = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (S, S, C):
            raise PictureError(
                f"views must be [{S}, {S}, {C}] for this encoder, but these are "
                f"{list(pixels.shape[1:])}: tile the picture with tiling.image_size {S}."
            )
        N, g = pixels.shape[0], S // P
        x = pixels[:, : g * P, : g * P].reshape(N, g, P, g, P, C)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, g * g, P * P * C)
        x = x @ self.weight.reshape(D, -1).T
        return x + self.bias if "bias" in self else x
