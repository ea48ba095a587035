"""SigLIP, and SigLIP 2 at a fixed resolution: vision tower, pooling head, text tower, scores.

A parameter's name is Hugging Face's, within a tower without `vision_model.` or `text_model.`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..attention import PackedAttention
from ..config import VisionConfig
from ..errors import ConfigError
from .blocks import MLP, Blocks, layer_number
from .patches import PatchEmbedding, grid_of
from .positions import place


class SiglipEmbeddings(nn.Module):
    """Patches plus a learned position each; no class token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(config.table_grid**2, config.hidden_size)
        self.rule, self.patch_size = config.positions, config.patch_size

    def __call__(self, pixels: mx.array) -> mx.array:
        grid = grid_of(pixels.shape[1:3], self.patch_size)
        x = self.patch_embedding(pixels)
        return x + place(self.position_embedding.weight, self.rule, grid)


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query looks at every token, then an MLP. [N, L, D] -> [N, D]"""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.probe = mx.random.normal((1, 1, D), scale=D**-0.5)
        self.attention = PackedAttention(D, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = MLP(D, config.intermediate_size, config.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        N, _, D = x.shape
        pooled = self.attention(mx.broadcast_to(self.probe, (N, 1, D)), x, x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVision(nn.Module):
    """[N, H, W, 3] normalised pixels -> [N, tokens, D], the configured feature layer.

    Blocks past that layer, the final norm and the head exist only where the config needs them.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        head = config.vision_use_head
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = Blocks(
            config.num_hidden_layers if head else config.num_layers_used,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            config.layer_norm_eps,
        )
        if config.vision_feature_norm or head:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if head:
            self.head = AttentionPool(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.encoder(self.embeddings(pixels), self.config.num_layers_used)
        x = self.post_layernorm(x) if self.config.vision_feature_norm else x
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def pooled(self, pixels: mx.array) -> mx.array:
        """[N, S, S, 3] -> [N, D]: the last block, the final norm, the attention-pooling head."""
        if not self.config.vision_use_head:
            raise ConfigError(
                "this SigLIP tower was built without its attention-pooling head: "
                "set vision.vision_use_head to true."
            )
        return self.head(self.post_layernorm(self.encoder(self.embeddings(pixels))))

    def feeds_features(self, name: str) -> bool:
        """Whether the tensor `name` has a say in the features that `__call__` gives."""
        number = layer_number(name)
        if number is not None:
            return number < self.config.num_layers_used
        if name.startswith("post_layernorm."):
            return self.config.vision_feature_norm
        return not name.startswith("head.")

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor `name` belongs to this tower but not to this config."""
        if name == "embeddings.position_ids":
            return True
        if self.config.vision_use_head or self.feeds_features(name):
            return False
        number = layer_number(name)
        return number is None or number < self.config.num_hidden_layers


@dataclass
class SiglipTextConfig:
    """SigLIP's text tower. Defaults are transformers', which are SigLIP-B's.

    projection_size: width of the shared space; 0 means hidden_size.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    projection_size: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"text.hidden_size (={self.hidden_size}) must be divisible by "
                f"text.num_attention_heads (={self.num_attention_heads})."
            )
        self.projection_size = self.projection_size or self.hidden_size


class TextEmbeddings(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SiglipText(nn.Module):
    """[T, L] token ids -> [T, projection_size].

    Every position sees every other, padding too, and the last one speaks for the text: SigLIP was
    trained so, on texts padded to 64.
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Blocks(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            config.layer_norm_eps,
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    def __call__(self, ids: mx.array) -> mx.array:
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ConfigError(
                f"a text of {ids.shape[1]} tokens is longer than SigLIP's "
                f"{self.config.max_position_embeddings}: cut it to that."
            )
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids)))[:, -1])

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor `name` is one that this tower does without."""
        return name == "embeddings.position_ids"


class Siglip(nn.Module):
    """Both towers, and the sigmoid of their agreement."""

    def __init__(self, vision: VisionConfig, text: SiglipTextConfig):
        super().__init__()
        if text.projection_size != vision.hidden_size:
            raise ConfigError(
                f"text.projection_size (={text.projection_size}) must equal "
                f"vision.hidden_size (={vision.hidden_size}): pictures and texts share one space."
            )
        self.vision_model = SiglipVision(dataclasses.replace(vision, vision_use_head=True))
        self.text_model = SiglipText(text)
        # SigLIP's own start: a temperature of 10 and a bias of -10.
        self.logit_scale = mx.log(mx.array([10.0]))
        self.logit_bias = mx.array([-10.0])

    def logits(self, pixels: mx.array, ids: mx.array) -> mx.array:
        """pixels [N, S, S, 3] and ids [T, L] -> [N, T] in float32"""
        image = _unit(self.vision_model.pooled(pixels))
        text = _unit(self.text_model(ids))
        scale = mx.exp(self.logit_scale.astype(mx.float32))
        return scale * (image @ text.T) + self.logit_bias.astype(mx.float32)

    def scores(self, pixels: mx.array, ids: mx.array) -> mx.array:
        """[N, T] probabilities that a text fits a picture; rows do not sum to 1"""
        return mx.sigmoid(self.logits(pixels, ids))


def _unit(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.maximum((x * x).sum(-1, keepdims=True), 1e-16))
