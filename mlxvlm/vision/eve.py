"""EVE's patch embedding layer, in the stead of a vision encoder (Diao et al. 2024).

    patches   conv 14 x 14, no bias        [H/14, W/14, D]
    cells     each 2 x 2 patches: their mean, plus what attention from the mean to the four gives
    class     a learned vector, plus what attention from it to all cells gives
    sequence  class, then row after row of cells, each row closed by a learned split token

There are no positions: the language model's own serve. Attention is scaled by D^-0.5, with D all
heads' width. Parameters have EVE's names (`VisionTokenizer`) behind `embeddings.`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..attention import attention
from ..config import VisionConfig
from ..images.whole import STRIDE
from .blocks import Blocks
from .patches import PatchEmbedding, grid_of

EPS = 1e-5


class EveAttention(nn.Module):
    """One query [N, 1, D] each looks at keys [N, L, D] and is added to what it finds."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = width**-0.5
        self.q = [nn.LayerNorm(width, eps=EPS), nn.Linear(width, width, bias=False)]
        self.kv = [nn.LayerNorm(width, eps=EPS), nn.Linear(width, 2 * width, bias=False)]
        self.proj = nn.Linear(width, width)

    def __call__(self, query: mx.array, keys: mx.array) -> mx.array:
        N, _, D = keys.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(N, -1, self.num_heads, D // self.num_heads).transpose(0, 2, 1, 3)

        norm, linear = self.q
        q = linear(norm(query))
        norm, linear = self.kv
        k, v = mx.split(linear(norm(keys)), 2, axis=-1)
        found = attention(heads(q), heads(k), heads(v), self.scale)
        return query + self.proj(found.transpose(0, 2, 1, 3).reshape(N, 1, D))


class EveEmbeddings(nn.Module):
    """[N, H, W, 3] normalised pixels -> [N, 1 + h * (w + 1), D], for h x w cells."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.patch_size = config.patch_size
        self.patch_embedding = PatchEmbedding(config, bias=False)
        self.class_embedding = mx.random.normal((D,))
        self.split_embedding = mx.random.normal((D,))
        self.local_attention = EveAttention(D, config.num_attention_heads)
        self.global_attention = EveAttention(D, config.num_attention_heads)

    def __call__(self, pixels: mx.array) -> mx.array:
        rows, columns = grid_of(pixels.shape[1:3], self.patch_size)
        h, w = rows // STRIDE, columns // STRIDE
        patches = self.patch_embedding(pixels)
        N, _, D = patches.shape
        x = patches.reshape(N, rows, columns, D)[:, : h * STRIDE, : w * STRIDE]
        x = x.reshape(N, h, STRIDE, w, STRIDE, D).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(N * h * w, STRIDE**2, D)
        mean = x.astype(mx.float32).mean(axis=1, keepdims=True).astype(x.dtype)
        cells = self.local_attention(mean, x).reshape(N, h * w, D)
        first = mx.broadcast_to(self.class_embedding.astype(cells.dtype), (N, 1, D))
        first = self.global_attention(first, cells)
        ends = mx.broadcast_to(self.split_embedding.astype(cells.dtype), (N, h, 1, D))
        lines = mx.concatenate([cells.reshape(N, h, w, D), ends], axis=2)
        return mx.concatenate([first, lines.reshape(N, h * (w + 1), D)], axis=1)


class EveVision(nn.Module):
    """The layer, in the place of a tower: it has no blocks, and trains with the language model."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = EveEmbeddings(config)
        self.encoder = Blocks(0, config.hidden_size, 1, config.intermediate_size, "gelu", EPS)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.embeddings(pixels)

    def feeds_features(self, name: str) -> bool:
        """Whether the tensor `name` has a say in the features that `__call__` gives."""
        return True

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor `name` belongs to this tower but not to this config."""
        return False
