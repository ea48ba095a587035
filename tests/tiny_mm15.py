"""MM1.5 small enough for a test: a CLIP tower, 2 x 2 tiles and the whole, a C-Abstractor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from tiny_vlm import tiny_config, tiny_tokenizer

from mlxvlm.config import TILINGS, ModelConfig, ProjectorConfig, TilingConfig, VisionConfig
from mlxvlm.model import VLM

# 8 x 8 patches a view, 4 visual tokens of them.
SIDE, TOKENS = 32, 4


def mm15_config(tiling: str = "cover-2x2", merge: str = "separators") -> ModelConfig:
    config = tiny_config(
        tiling=TilingConfig(image_size=SIDE, **TILINGS[tiling]),
        vision=VisionConfig(
            model_type="clip_vision_model",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=4,
            hidden_act="quick_gelu",
            vision_feature_layer=-2,
            vision_feature_norm=False,
            vision_feature_select_strategy="default",
        ),
        projector=ProjectorConfig(
            type="c_abstractor", hidden_size=24, num_layers=1, num_query_tokens=TOKENS
        ),
    )
    config.prompt.merge = merge
    return config


def mm15(seed: int = 3, **choices: Any) -> VLM:
    """Random weights by which pictures, and what lies in them, matter."""
    mx.random.seed(seed)
    vlm = VLM(mm15_config(**choices), tiny_tokenizer())
    vlm.language.lm_head.weight = mx.random.normal(vlm.language.lm_head.weight.shape)
    vlm.projector.linear_2.weight = 4 * vlm.projector.linear_2.weight
    for layer in vlm.language.layers or ():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = layer.self_attn[name]
            linear.weight = 3 * linear.weight
    vlm.eval()
    mx.eval(vlm.parameters())
    return vlm


def clip_folder(folder: Path, side: int = SIDE) -> Path:
    """A CLIP tower as the hub has it, and beside it, in `language`, a language model."""
    import json

    from mlx.utils import tree_flatten

    vlm = mm15()
    folder.mkdir(parents=True)
    flat: Any = tree_flatten(vlm.vision.parameters())
    tensors = {f"vision_model.{name}": value for name, value in flat}
    for number in (1,):  # the last block, which features of layer -2 do without
        tensors |= {
            name.replace("layers.0.", f"layers.{number}."): value
            for name, value in tensors.items()
            if "layers.0." in name
        }
    tensors["vision_model.post_layernorm.weight"] = mx.ones((32,))
    tensors["vision_model.post_layernorm.bias"] = mx.zeros((32,))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    vision = vlm.config.vision
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size"
    raw = {name: getattr(vision, name) for name in names.split()}
    raw |= {"model_type": "clip_vision_model", "image_size": side, "hidden_act": "quick_gelu"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
