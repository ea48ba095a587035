"""The resampler of Qwen-VL and MiniCPM-V: learned queries look at the patches, once.

Bai et al. 2023, https://arxiv.org/abs/2308.12966; as in MiniCPM-Llama3-V 2.5 the keys carry the
places of the patches, and queries and values none. Parameters have the published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attention import PackedAttention
from ..config import ProjectorConfig
from ..errors import ConfigError
from .pool import Pool


class Queries(nn.Module):
    """What resamplers are made of: kv_proj (where widths differ) and ln_kv for the patches, ln_q's
    queries, attn, ln_post, and a matrix `proj` from the right."""

    def __init__(self, config: ProjectorConfig, channels: int, language_width: int):
        super().__init__()
        width = config.hidden_size or language_width
        heads = heads_of(config, width)
        eps = config.layer_norm_eps
        self.query = small(config.num_query_tokens, width)
        if channels != width:
            self.kv_proj = nn.Linear(channels, width, bias=False)
            self.kv_proj.weight = small(width, channels)
        self.attn = PackedAttention(width, heads)
        self.attn.out_proj.weight = small(width, width)
        self.attn.out_proj.bias = mx.zeros((width,))
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = mx.random.normal((width, language_width), scale=width**-0.5)

    def seen(self, x: mx.array) -> mx.array:
        """[N, T, channels] -> [N, T, width]: what the queries look at."""
        return self.ln_kv(self.kv_proj(x) if "kv_proj" in self else x)


class Resampler(Queries):
    """[N, T, Dv] -> [N, num_query_tokens, Dl]; a view is a row, so views never see each other."""

    def __init__(self, config: ProjectorConfig, vision_width: int, language_width: int, grid: int):
        pool = Pool(config.pool, grid)
        super().__init__(config, vision_width * pool.factor, language_width)
        self.pool = pool

    def __call__(self, x: mx.array, sizes: Sequence[tuple[int, int]] | None = None) -> mx.array:
        """sizes: (rows, columns) of each view's patches, which come first among its T tokens; by
        default all have the encoder's square grid, pooled as the projector says."""
        if sizes is None:
            x = self.pool(x)
            sizes = [(self.pool.side, self.pool.side)] * x.shape[0]
        T = x.shape[1]
        different = sorted(set(sizes))
        fits = max(h * w for h, w in different) <= T
        if not fits or (len(different) == 1 and different[0][0] * different[0][1] != T):
            grids = ", ".join(f"{h} x {w}" for h, w in different)
            raise ConfigError(
                f"the projector takes views of {grids} tokens, but the features have {T} a view."
            )
        values = self.seen(x)
        keys = values + self._places(sizes, different, T).astype(values.dtype)
        mask = None
        if len(different) > 1:
            counts = mx.array([h * w for h, w in sizes])
            mask = (mx.arange(T) < counts[:, None])[:, None, None]
        out = self.attn(self.ln_q(self.query)[None], keys, values, mask)
        return self.ln_post(out) @ self.proj

    def _places(
        self, sizes: Sequence[tuple[int, int]], different: list[tuple[int, int]], tokens: int
    ) -> mx.array:
        """[1 or N, tokens, D] for the keys, zeros where a view has no patch"""
        width = self.query.shape[1]
        table = np.zeros((len(different), tokens, width), np.float32)
        for row, (h, w) in enumerate(different):
            table[row, : h * w] = sincos(h, w, width)
        found = mx.array(table)
        if len(different) == 1:
            return found
        return found[mx.array([different.index(size) for size in sizes])]


def heads_of(config: ProjectorConfig, width: int) -> int:
    """Heads of a resampler of this width."""
    heads = config.num_attention_heads or max(1, width // 128)
    if width % heads or width % 4:
        raise ConfigError(
            f"a resampler's width (={width}) must be divisible by 4, for sines and cosines of "
            f"rows and columns, and by its num_attention_heads (={heads}): set "
            "projector.hidden_size or projector.num_attention_heads."
        )
    return heads


def sincos(height: int, width: int, dim: int) -> np.ndarray:
    """[height * width, dim] float32, places in rows: the first half says the column, the second
    the row, each as the sines and then the cosines of it / 10000^(i / (dim / 4)).

    As MAE has it (He et al. 2021), two-dimensional from Vaswani et al. 2017.
    """
    table = np.empty((height, width, dim), np.float32)
    table[..., : dim // 2] = _waves(width, dim // 4)
    table[..., dim // 2 :] = _waves(height, dim // 4)[:, None]
    return table.reshape(height * width, dim)


@lru_cache(maxsize=128)
def _waves(count: int, rates: int) -> np.ndarray:
    """[count, 2 * rates] float32: sines, then cosines, of the places 0 to count along an axis."""
    angles = np.arange(count)[:, None] * 10000.0 ** -(np.arange(rates) / rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def small(*shape: int) -> mx.array:
    """Normal values of deviation 0.02, cut off at two deviations."""
    return 0.02 * mx.random.truncated_normal(-2, 2, shape)
