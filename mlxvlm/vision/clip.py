"""CLIP's vision tower.

Parameters have Hugging Face's names without `vision_model.` (`pre_layrnorm` is theirs).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from ..errors import ConfigError
from .blocks import Blocks, layer_number
from .patches import PatchEmbedding, grid_of
from .positions import place


class ClipEmbeddings(nn.Module):
    """A class token, then the patches (no bias), plus a learned position each."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.class_embedding = mx.random.normal((D,), scale=D**-0.5)
        self.patch_embedding = PatchEmbedding(config, bias=False)
        self.position_embedding = nn.Embedding(config.table_grid**2 + 1, D)
        self.rule, self.patch_size = config.positions, config.patch_size

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)
        N, _, D = patches.shape
        first = mx.broadcast_to(self.class_embedding.astype(patches.dtype), (N, 1, D))
        x = mx.concatenate([first, patches], axis=1)
        table = self.position_embedding.weight
        if self.rule == "fixed":
            return x + table
        grid = grid_of(pixels.shape[1:3], self.patch_size)
        return x + mx.concatenate([table[:1], place(table[1:], self.rule, grid)])


class ClipVision(nn.Module):
    """[N, H, W, 3] normalised pixels -> [N, tokens, D], the configured feature layer.

    Hidden state 0 is the output of `pre_layrnorm`. "default" drops the class token, after the norm.
    Blocks past the feature layer, and `post_layernorm`, exist only where the config needs them.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.vision_use_head:
            raise ConfigError(
                "vision.vision_use_head must be false for CLIP: only SigLIP has a pooling head."
            )
        self.config = config
        D, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(D, eps=eps)
        self.encoder = Blocks(
            config.num_layers_used,
            D,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            eps,
        )
        if config.vision_feature_norm:
            self.post_layernorm = nn.LayerNorm(D, eps=eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        if self.config.vision_feature_norm:
            x = self.post_layernorm(x)
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def feeds_features(self, name: str) -> bool:
        """Whether the tensor `name` has a say in the features that `__call__` gives."""
        number = layer_number(name)
        if number is not None:
            return number < self.config.num_layers_used
        return self.config.vision_feature_norm or not name.startswith("post_layernorm.")

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor `name` belongs to this tower but not to this config."""
        if name == "embeddings.position_ids":
            return True
        number = layer_number(name)
        beyond = number is not None and number >= self.config.num_hidden_layers
        return not beyond and not self.feeds_features(name)
