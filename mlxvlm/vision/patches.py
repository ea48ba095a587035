"""Pixels to patch embeddings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from ..errors import PictureError

# Of the bytes 0 to 255.
MIDDLE = 128


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: [N, S, S, C] -> [N, g*g, D].

    The grid is floor(S / P) patches a side, in rows; what is left at the right and bottom is unused
    (384 at 14: 27 patches and 6 pixels). `weight` keeps MLX's convolution layout, [D, P, P, C].

    Pixels are normalised, or uint8: then the normalisation is done to the weights, which are fewer.
    """

    def __init__(self, config: VisionConfig, bias: bool = True):
        super().__init__()
        D, P, C = config.hidden_size, config.patch_size, config.num_channels
        self.image_size = config.image_size
        self.image_mean, self.image_std = config.image_mean, config.image_std
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
        if pixels.dtype == mx.uint8:
            weight, bias = self._for_bytes()
            # Around 0, so that sums stay as small as they were; float32 until all is added.
            x = (x.astype(mx.float32) - MIDDLE) @ weight.reshape(D, -1).T + bias
            return x.astype(self.weight.dtype)
        x = x @ self.weight.reshape(D, -1).T
        return x + self.bias if "bias" in self else x

    def _for_bytes(self) -> tuple[mx.array, mx.array]:
        """Float32 weight and bias for bytes u - MIDDLE instead of (u / 255 - mean) / std."""
        mean, std = mx.array(self.image_mean), mx.array(self.image_std)
        weight = self.weight.astype(mx.float32)
        bias = (weight * ((MIDDLE / 255 - mean) / std)).sum((1, 2, 3))
        if "bias" in self:
            bias = bias + self.bias
        return weight / (255 * std), bias
