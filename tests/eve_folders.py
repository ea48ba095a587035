"""EVE for tests: a folder as its authors save it, with tokens of 2 x 2 patches of 2 pixels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import Tensors, write
from mlx.utils import tree_flatten
from tiny_tokenizers import sentencepiece

from mlxvlm.config import VisionConfig
from mlxvlm.vision.build import build_vision

WIDTH, TEXT, LAYERS, HEADS, TEACHER = 16, 32, 4, 8, 32


def write_eve(folder: Path, ratio: int = 1, seed: int = 5, **changes: Any) -> Path:
    """ratio: tokens a cell along a side, 2 as in the 1344 model. changes: of config.json."""
    rng = np.random.default_rng(seed)
    vocab = sentencepiece().get_vocab_size() + 3

    def matrix(*shape: int) -> mx.array:
        scale = 1.5 * math.prod(shape[1:] or shape) ** -0.5
        return mx.array(rng.normal(0, scale, shape).astype(np.float32))

    def vector(size: int, around: float = 0.0) -> mx.array:
        return mx.array((around + rng.normal(0, 0.3, size)).astype(np.float32))

    tower = "model.vision_tower"
    tensors: Tensors = {
        f"{tower}.patch_embedding.weight": matrix(WIDTH, 3, 2, 2),
        f"{tower}.class_embedding": vector(WIDTH, 0.5),
        f"{tower}.split_embedding": vector(WIDTH, -0.5),
    }
    for part in ("local_attention", "global_attention"):
        at = f"{tower}.{part}"
        for kind, rows in (("q", WIDTH), ("kv", 2 * WIDTH)):
            tensors[f"{at}.{kind}.0.weight"] = vector(WIDTH, 1.0)
            tensors[f"{at}.{kind}.0.bias"] = vector(WIDTH)
            tensors[f"{at}.{kind}.1.weight"] = 2 * matrix(rows, WIDTH)
        tensors[f"{at}.proj.weight"] = matrix(WIDTH, WIDTH)
        tensors[f"{at}.proj.bias"] = vector(WIDTH)
    for number, (rows, columns) in {0: (TEXT, WIDTH), 2: (TEXT, TEXT)}.items():
        tensors[f"model.mm_projector.{number}.weight"] = matrix(rows, columns)
        tensors[f"model.mm_projector.{number}.bias"] = vector(rows)
    tensors["model.embed_tokens.weight"] = matrix(vocab, TEXT)
    tensors["model.norm.weight"] = vector(TEXT, 1.0)
    tensors["lm_head.weight"] = 2 * matrix(vocab, TEXT)
    for number in range(LAYERS):
        at = f"model.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{part}.weight"] = matrix(TEXT, TEXT)
        for part in ("gate_proj", "up_proj"):
            tensors[f"{at}.mlp.{part}.weight"] = matrix(48, TEXT)
        tensors[f"{at}.mlp.down_proj.weight"] = matrix(TEXT, 48)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{part}.weight"] = vector(TEXT, 1.0)
    config = {
        "model_type": "eve",
        "architectures": ["EVELlamaForCausalLM"],
        "hidden_size": TEXT,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        "image_aspect_ratio": "square",
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"openai/eve-patch2-anypixel-{96 * ratio}",
        "mm_vision_tower_clip": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "requires_cliploss": True,
        "mm_use_im_start_end": False,
        **changes,
    }
    return write(folder, {k: v for k, v in config.items() if v is not None}, tensors)


def write_teacher(folder: Path, seed: int = 3, size: int = 48) -> Path:
    """A CLIP with 24 x 24 patches of 2 pixels, as its folder on the hub."""
    config = VisionConfig(
        model_type="clip_vision_model",
        hidden_size=TEACHER,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=2,
        hidden_act="quick_gelu",
        vision_feature_norm=True,
    )
    mx.random.seed(seed)
    flat: Any = tree_flatten(build_vision(config).parameters())
    tensors = {f"vision_model.{name}": 2 * value for name, value in flat}
    fields = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "image_size", "patch_size", "hidden_act")
    pixels = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({f: getattr(config, f) for f in fields}))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder
