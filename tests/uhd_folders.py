"""LLaVA-UHD for tests: a folder in its authors' layout, its tower inside or apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from checkpoints import write
from minicpm_folders import Noise
from tiny_tokenizers import sentencepiece

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}


def write_uhd(folder: Path, inside: bool = True, queries: int = 9, **changes: Any) -> Path:
    """Slices of about 32 x 32 pixels, of patches of 8; 3 x 3 queries of width 256, two heads.
    changes: fields of config.json."""
    apart = folder / "tower"
    vocab = sentencepiece().get_vocab_size()
    config = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(apart),
        "mm_projector_type": "adapt_spatial_resampler",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **changes,
    }
    at = "model.vision_tower.vision_tower.vision_model" if inside else "vision_model"
    tower = Noise(3)
    tower.vector(f"{at}.embeddings.class_embedding", 32)
    tower.matrix(f"{at}.embeddings.patch_embedding.weight", 32, 3, 8, 8)
    tower.matrix(f"{at}.embeddings.position_embedding.weight", 17, 32, scale=6)
    tower.norm(f"{at}.pre_layrnorm", 32)
    tower.tower(at, 3, 32, 48)
    rest = Noise(4)
    rest.resampler("model.mm_projector", queries, 32, 256)
    rest.matrix("model.mm_projector.pos_embed", queries, 256, scale=8)
    rest.llama("model", "lm_head", config)
    apart.mkdir(parents=True)
    if inside:
        rest.tensors |= tower.tensors
        (apart / "config.json").write_text(json.dumps(TOWER))
    else:
        write(apart, TOWER, tower.tensors)
    return write(folder / "model", config, rest.tensors)


def numbers(tensors: dict[str, mx.array]) -> dict[str, Any]:
    """float64 NumPy"""
    import numpy as np

    return {name: np.array(value).astype(np.float64) for name, value in tensors.items()}
