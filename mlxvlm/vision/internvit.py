"""InternViT, the vision tower of InternVL: 300M (LayerNorm) and 6B (RMSNorm, normed queries, keys).

Parameters have the names of OpenGVLab's own checkpoints, with q, k and v in one matrix `attn.qkv`;
`sanitize` puts transformers' three together. After InternVL's `modeling_intern_vit.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..attention import attention
from ..config import VisionConfig
from ..errors import ConfigError
from .blocks import MLP, DropPath, layer_number
from .patches import PatchEmbedding

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
# What each branch's output is multiplied by at first, a number a channel.
LAYER_SCALE = 0.1
SEPARATE = ("q_proj", "k_proj", "v_proj")


class InternVitEmbeddings(nn.Module):
    """A class token, then the patches, plus a learned position each."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.class_embedding = mx.random.normal((1, 1, D), scale=D**-0.5)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = mx.random.normal((1, config.grid**2 + 1, D), scale=D**-0.5)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)
        N, _, D = patches.shape
        first = mx.broadcast_to(self.class_embedding.astype(patches.dtype), (N, 1, D))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding


class InternVitAttention(nn.Module):
    """Self-attention, [N, L, D] -> [N, L, D]; queries and keys may each be normed over all heads at
    once, the full width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.qkv = nn.Linear(D, 3 * D, bias=config.attention_bias)
        self.proj = nn.Linear(D, D)
        if config.use_qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        N, L, D = x.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(N, L, self.num_heads, -1).transpose(0, 2, 1, 3)

        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attention(heads(q), heads(k), heads(v), self.scale)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(N, L, D))


class InternVitLayer(nn.Module):
    """x + ls1 attn(norm1(x)), then x + ls2 mlp(norm2(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D, norm = config.hidden_size, NORMS[config.norm_type]
        self.norm1 = norm(D, eps=config.layer_norm_eps)
        self.attn = InternVitAttention(config)
        self.ls1 = mx.full((D,), LAYER_SCALE)
        self.norm2 = norm(D, eps=config.layer_norm_eps)
        self.mlp = MLP(D, config.intermediate_size, config.hidden_act)
        self.ls2 = mx.full((D,), LAYER_SCALE)
        self.drop_path = DropPath()

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.drop_path(self.ls1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.ls2 * self.mlp(self.norm2(x)))


class InternVitBlocks(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [InternVitLayer(config) for _ in range(config.num_layers_used)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class InternVit(nn.Module):
    """[N, S, S, 3] normalised pixels -> [N, tokens, D], the configured feature layer.

    "default" drops the class token. There is no norm after the last block, and no block past the
    feature layer.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.vision_feature_norm or config.vision_use_head:
            raise ConfigError(
                "vision.vision_feature_norm and vision.vision_use_head must be false: InternViT "
                "has neither a final norm nor a pooling head."
            )
        self.config = config
        self.embeddings = InternVitEmbeddings(config)
        self.encoder = InternVitBlocks(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.encoder(self.embeddings(pixels))
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def feeds_features(self, name: str) -> bool:
        """Whether the tensor `name` has a say in the features that `__call__` gives."""
        number = layer_number(name)
        return number is None or number < self.config.num_layers_used

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor `name` belongs to this tower but not to this config."""
        number = layer_number(name)
        used, known = self.config.num_layers_used, self.config.num_hidden_layers
        return number is not None and used <= number < known

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors by name, where q, k and v may be separate -> as this tower has them."""
        out = dict(weights)
        for name in weights:
            module, _, leaf = name.rpartition(".")
            stem, _, last = module.rpartition(".")
            if last != "q_proj":
                continue
            three = [f"{stem}.{part}.{leaf}" for part in SEPARATE]
            if all(part in out for part in three):
                out[f"{stem}.qkv.{leaf}"] = mx.concatenate([out.pop(part) for part in three])
        return out
