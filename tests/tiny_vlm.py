"""A whole model small enough for a test: 16 tokens a picture, a byte a token, random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, TilingConfig, VisionConfig
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.model import VLM

CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|image|>",
)
IMAGE = 256 + CONTROL.index("<|image|>")
EOT = 256 + CONTROL.index("<|eot_id|>")
VOCAB = 272  # ten rows more than the tokenizer has ids
# A decoder with a convolution: what only lfm2 asks for.
LFM2: dict[str, Any] = {
    "block_auto_adjust_ff_dim": False,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 8,
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_types": ["conv", "full_attention"],
    "max_position_embeddings": 512,
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,
}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level, without merges: any text, one token a byte."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    return Tokenizer(backend, None, {})


def tiny_config(**changes: Any) -> ModelConfig:
    parts: dict[str, Any] = {
        "tiling": TilingConfig(image_size=32),
        "vision": VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        "projector": ProjectorConfig(hidden_size=32, num_attention_heads=2),
        "prompt": PromptConfig(image_token_id=IMAGE),
        "language": {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
    }
    return ModelConfig(**{**parts, **changes})


def tiny_vlm(config: ModelConfig | None = None, seed: int = 1) -> VLM:
    """Random weights, a function of the seed, whose answers vary with question and picture."""
    mx.random.seed(seed)
    vlm = VLM(config or tiny_config(), tiny_tokenizer())
    vlm.language.lm_head.weight = mx.random.normal(vlm.language.lm_head.weight.shape)
    # Pictures and distant tokens matter: visual tokens as large as words, attention that is felt.
    vlm.projector.out_proj.weight = 4 * vlm.projector.out_proj.weight
    for layer in vlm.language.layers or ():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = layer.self_attn[name]
            linear.weight = 3 * linear.weight
    vlm.eval()
    mx.eval(vlm.parameters())
    return vlm


def sliced_config(**changes: Any) -> ModelConfig:
    """A tower that takes views of any grid, slices of about 32 x 32 pixels, four queries a view."""
    tower = tiny_config().vision
    parts: dict[str, Any] = {
        "tiling": TilingConfig("slices", 32, max_tiles=6, patch_size=8),
        "vision": dataclasses.replace(tower, positions="buckets", position_grid=10),
        "projector": ProjectorConfig("resampler", num_query_tokens=4, num_attention_heads=2),
    }
    language = {**tiny_config().language, "max_position_embeddings": 4096}
    return tiny_config(language=language, **{**parts, **changes})


def sliced_vlm(config: ModelConfig | None = None, seed: int = 1) -> VLM:
    """Random weights, under which every view and place in it matters."""
    mx.random.seed(seed)
    vlm = VLM(config or sliced_config(), tiny_tokenizer())
    vlm.language.lm_head.weight = mx.random.normal(vlm.language.lm_head.weight.shape)
    vlm.vision.embeddings.position_embedding.weight *= 2
    vlm.projector.query = 20 * vlm.projector.query
    vlm.eval()
    mx.eval(vlm.parameters())
    return vlm


def picture(seed: int, size: int = 40) -> np.ndarray:
    """[size, size, 3] uint8 noise, as an image that `look` takes."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
