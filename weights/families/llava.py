"""LLaVA with a two-layer MLP and a SigLIP or CLIP tower, in the three layouts found in the wild.

    the hub, older transformers   language_model.model.*   vision_tower.vision_model.*
    transformers 5                language_model.model.*   vision_tower.*
      the same, in memory         model.language_model.*   model.vision_tower.*   lm_head.*
    mlx-vlm (mlx-community)       as the hub's, convolutions channel-last, tensors quantised

and `multi_modal_projector.linear_{1,2}` in all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig
from mlxvlm.errors import ConfigError
from mlxvlm.language.load import DEFAULTS, translate
from mlxvlm.weights.families.towers import preprocessing, processor, vision_config
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = ("llava",)
PARTS = ("language_model.", "vision_tower.", "multi_modal_projector.")
# A decoder's modules beside its trunk.
HEADS = ("model.", "lm_head.", "output.")
LARGE_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def rename(key: str) -> str | None:
    if key.startswith("model.") and key.removeprefix("model.").startswith(PARTS):
        key = key.removeprefix("model.")
    if key.startswith("lm_head."):
        return "language." + key
    part, _, rest = key.partition(".")
    if part == "language_model":
        return "language." + (rest if rest.startswith(HEADS) else f"model.{rest}")
    if part == "vision_tower":
        return "vision." + rest.removeprefix("vision_model.")
    if part == "multi_modal_projector":
        return "projector." + rest
    return key


def hub_name(name: str) -> str:
    """A parameter's name in the hub's older layout, which every release of transformers reads."""
    part, _, rest = name.partition(".")
    if part == "vision":
        return "vision_tower.vision_model." + rest
    return {"projector": "multi_modal_projector.", "language": "language_model."}[part] + rest


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices; the prompt's layout is left to who knows the tokenizer.

    Where the image processor is CLIP's, which crops, and says nothing of padding, pictures are
    padded as LLaVA's own code does; `load(..., resize="crop")` is what the file says.
    """
    raw = checkpoint.config
    layer = raw.get("vision_feature_layer", -2)
    if isinstance(layer, list):
        if len(layer) != 1:
            raise ConfigError(f"vision_feature_layer (={layer}) must be one layer, not several.")
        layer = layer[0]
    vision = vision_config(
        raw.get("vision_config") or LARGE_CLIP,
        vision_feature_layer=layer,
        vision_feature_norm=False,
        vision_feature_select_strategy=raw.get("vision_feature_select_strategy", "default"),
    )
    tiling, mean, std = preprocessing(checkpoint.folder, vision)
    if tiling.resize == "crop" and "do_pad" not in processor(checkpoint.folder):
        # LLaVA-1.5 was trained on padded pictures, which CLIP's processor cannot say.
        tiling = tiling.resized("pad", mean)
    return ModelConfig(
        tiling=tiling,
        vision=dataclasses.replace(vision, image_mean=mean, image_std=std),
        projector=ProjectorConfig(
            type="mlp",
            hidden_act=raw.get("projector_hidden_act", "gelu"),
            bias=raw.get("multimodal_projector_bias", True),
        ),
        prompt=PromptConfig(image_token_id=_image_token_id(raw)),
        language=_language(raw),
    )


def _image_token_id(raw: dict[str, Any]) -> int:
    for name in ("image_token_index", "image_token_id"):
        if isinstance(raw.get(name), int):
            return raw[name]
    return 32000


def _language(raw: dict[str, Any]) -> dict[str, Any]:
    text = {"model_type": "llama", **(raw.get("text_config") or {})}
    kind = text["model_type"]
    if "hidden_size" not in text and kind not in DEFAULTS:
        raise ConfigError(
            f"text_config of type {kind!r} leaves out hidden_size, and its default is not known."
        )
    # transformers 5 moved the head, and its tie, from the language model to the whole.
    text["tie_word_embeddings"] = bool(
        text.get("tie_word_embeddings") or raw.get("tie_word_embeddings")
    )
    for name in ("quantization", "quantization_config"):
        text.pop(name, None)
    return translate(text)
