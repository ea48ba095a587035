"""InternVL 2.5 (and 3, its twin in form), in the layouts found in the wild.

    OpenGVLab                     vision_model.*   mlp1.{0,1,3}.*   language_model.*
    transformers 5, on disk       vision_tower.*   multi_modal_projector.*   language_model.model.*
      the same, in memory         model.vision_tower.*   model.language_model.*   lm_head.*

No code of a repository is run: its fields say all that is needed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from mlxvlm.config import (
    TILINGS,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    TilingConfig,
    VisionConfig,
)
from mlxvlm.errors import ConfigError
from mlxvlm.language.load import translate
from mlxvlm.weights.families import internvit, llava
from mlxvlm.weights.families.towers import IMAGENET_MEAN, IMAGENET_STD, preprocessing, processor
from mlxvlm.weights.folder import Checkpoint

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer

OPENGVLAB = "internvl_chat"
MODEL_TYPES = ("internvl", OPENGVLAB)
IMAGE_TOKEN = "<IMG_CONTEXT>"
# Of OpenGVLab's nn.Sequential; 2 is the GELU.
MLP = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
POOLS = {"v1": "concat2_columns", "v2": "concat2"}
TEMPLATES = ("internvl2_5",)
# Both layouts' LayerNorm in the projector is PyTorch's own.
EPS = 1e-5


def rename(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part == "vision_model":
        return internvit.rename(rest)
    number, _, leaf = rest.partition(".")
    if part == "mlp1" and number in MLP:
        return f"projector.{MLP[number]}.{leaf}"
    ours = llava.rename(key)
    if ours is not None and ours.startswith("vision."):
        return internvit.rename(ours.removeprefix("vision."))
    return ours


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices. Where config.json is OpenGVLab's, `find_image_token` has the last word."""
    raw = checkpoint.config
    if raw["model_type"] == OPENGVLAB:
        return _opengvlab(checkpoint)
    vision = internvit.tower(
        raw.get("vision_config") or {"model_type": "internvl_vision"},
        _one_layer(raw.get("vision_feature_layer", -1)),
        raw.get("vision_feature_select_strategy", "default"),
    )
    tiling, mean, std = preprocessing(checkpoint.folder, vision)
    said = processor(checkpoint.folder)
    # Their processor cuts tiles and adds a thumbnail, whatever the image processor's file says.
    least, most = said.get("min_patches", 1), said.get("max_patches", 12)
    return ModelConfig(
        tiling=dataclasses.replace(
            tiling, **{**TILINGS["dynamic"], "min_tiles": least, "max_tiles": most}
        ),
        vision=dataclasses.replace(vision, image_mean=mean, image_std=std),
        projector=_projector(raw, vision, "v2", raw.get("projector_hidden_act", "gelu")),
        prompt=PromptConfig(layout="internvl2_5", image_token_id=raw.get("image_token_id", 151667)),
        language=_language(checkpoint, raw.get("text_config")),
    )


def find_image_token(config: ModelConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sets the id of <IMG_CONTEXT>, which OpenGVLab's config.json leaves to the tokenizer."""
    if checkpoint.config["model_type"] != OPENGVLAB:
        return
    if IMAGE_TOKEN not in tokenizer.control:
        raise ConfigError(
            f"{checkpoint.folder}: the tokenizer has no {IMAGE_TOKEN}, which stands for a visual "
            "token. Take the tokenizer's files from the model's own repository."
        )
    config.prompt.image_token_id = tokenizer.control[IMAGE_TOKEN]


def _opengvlab(checkpoint: Checkpoint) -> ModelConfig:
    raw = checkpoint.config
    template = raw.get("template")
    if template not in TEMPLATES:
        raise ConfigError(
            f"{checkpoint.folder} has prompt template {template!r}, which is not supported: only "
            f"{', '.join(TEMPLATES)}, as every InternVL 2.5 has it."
        )
    vision = internvit.tower(
        raw.get("vision_config") or {}, _one_layer(raw.get("select_layer", -1))
    )
    forced = raw.get("force_image_size") or vision.image_size
    if forced != vision.image_size:
        raise ConfigError(
            f"force_image_size (={forced}) must be the vision tower's image_size "
            f"(={vision.image_size}): its grid is fixed."
        )
    # Their code normalises so, and never reads the image processor's file.
    vision = dataclasses.replace(vision, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    return ModelConfig(
        tiling=_tiling(raw, vision),
        vision=vision,
        projector=_projector(raw, vision, raw.get("ps_version", "v1"), "gelu"),
        prompt=PromptConfig(layout=template, system=raw.get("system_message") or ""),
        language=_language(checkpoint, raw.get("llm_config")),
    )


def _tiling(raw: dict[str, Any], vision: VisionConfig) -> TilingConfig:
    plain = TilingConfig(image_size=vision.image_size)
    if not raw.get("dynamic_image_size"):
        return plain.resized("pad" if raw.get("pad2square") else "squash", vision.image_mean)
    return dataclasses.replace(
        plain,
        **TILINGS["dynamic"],
        min_tiles=raw.get("min_dynamic_patch", 1),
        max_tiles=raw.get("max_dynamic_patch", 6),
        use_thumbnail=raw.get("use_thumbnail", False),
    )


def _projector(
    raw: dict[str, Any], vision: VisionConfig, version: str, act: str
) -> ProjectorConfig:
    ratio = raw.get("downsample_ratio", 0.5)
    if ratio != 0.5:
        raise ConfigError(f"downsample_ratio (={ratio}) must be 0.5: four patches make a token.")
    if version not in POOLS:
        raise ConfigError(f"ps_version (={version!r}) must be one of {', '.join(POOLS)}.")
    if vision.grid % 2:
        raise ConfigError(
            f"the vision tower's patches a side (={vision.grid}) must be even: four make a token."
        )
    return ProjectorConfig(
        type="mlp", pool=POOLS[version], layer_norm=True, hidden_act=act, layer_norm_eps=EPS
    )


def _one_layer(layer: Any) -> int:
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        raise ConfigError(f"the vision feature layer (={layer}) must be one layer, not several.")
    return layer


def _language(checkpoint: Checkpoint, text: dict[str, Any] | None) -> dict[str, Any]:
    text = {"model_type": "qwen2", **(text or {})}
    # What config.json says of the tie has been wrong on the hub; the head is there or it is not.
    heads = (rename(key) or "" for key in checkpoint.tensors)
    text["tie_word_embeddings"] = not any(
        key.startswith(("language.lm_head.", "language.output.")) for key in heads
    )
    for name in ("quantization", "quantization_config"):
        text.pop(name, None)
    return translate(text)
