"""Pixels to patch embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import VisionConfig
from ..errors import PictureError

# Of the bytes 0 to 255.
MIDDLE = 128


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: [N, H, W, C] -> [N, h*w, D].

    The grid is floor(H / P) by floor(W / P) patches, in rows; what is left at the right and bottom
    is unused (384 at 14: 27 patches and 6 pixels). H = W = image_size, unless the tower takes any
    grid. `weight` keeps MLX's convolution layout, [D, P, P, C].

    Pixels are normalised, or uint8: then the normalisation is done to the weights, which are fewer.
    """

    def __init__(self, config: VisionConfig, bias: bool = True):
        super().__init__()
        D, P, C = config.hidden_size, config.patch_size, config.num_channels
        self.image_size = None if config.takes_any_grid else config.image_size
        # No tuples: a module takes what is in them for its parameters.
        self.image_mean, self.image_std = np.array(config.image_mean), np.array(config.image_std)
        bound = (P * P * C) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (D, P, P, C))
        if bias:
            self.bias = mx.zeros((D,))

    def __call__(self, pixels: mx.array) -> mx.array:
        D, P, _, C = self.weight.shape
        S = self.image_size
        if pixels.ndim != 4 or pixels.shape[-1] != C or min(pixels.shape[1:3]) < P:
            raise PictureError(
                f"views must be [height, width, {C}] of at least {P} pixels a side for this "
                f"encoder, but these are {list(pixels.shape[1:])}."
            )
        if S is not None and pixels.shape[1:] != (S, S, C):
            raise PictureError(
                f"views must be [{S}, {S}, {C}] for this encoder, but these are "
                f"{list(pixels.shape[1:])}: tile the picture with tiling.image_size {S}."
            )
        h, w = grid_of(pixels.shape[1:3], P)
        N = pixels.shape[0]
        x = pixels[:, : h * P, : w * P].reshape(N, h, P, w, P, C)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, h * w, P * P * C)
        if pixels.dtype == mx.uint8:
            weight, bias = self._for_bytes()
            # Around 0, so that sums stay as small as they were; float32 until all is added.
            x = (x.astype(mx.float32) - MIDDLE) @ weight.reshape(D, -1).T + bias
            return x.astype(self.weight.dtype)
        x = x @ self.weight.reshape(D, -1).T
        return x + self.bias if "bias" in self else x

    def _for_bytes(self) -> tuple[mx.array, mx.array]:
        """Float32 weight and bias for bytes u - MIDDLE instead of (u / 255 - mean) / std."""
        mean, std = (mx.array(x, dtype=mx.float32) for x in (self.image_mean, self.image_std))
        weight = self.weight.astype(mx.float32)
        bias = (weight * ((MIDDLE / 255 - mean) / std)).sum((1, 2, 3))
        if "bias" in self:
            bias = bias + self.bias
        return weight / (255 * std), bias


def grid_of(size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of whole patches in a view of (height, width) pixels."""
    return size[0] // patch_size, size[1] // patch_size
