"""EVE-7B as its authors save it: a Vicuna with a patch embedding layer in the stead of an encoder.

    model.layers.*  model.embed_tokens.*  model.norm.*  lm_head.*    as in the language model alone
    model.vision_tower.{patch_embedding,class_embedding,local_attention...}
    model.mm_projector.{0,2}.*

What serves its training alone, the teacher and the patch aligning layer, is left unread where it is
there. config.json is the language model's, with EVE's choices beside.
"""

from __future__ import annotations

import re
from typing import Any

from mlxvlm.config import (
    EVE,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    TilingConfig,
    VisionConfig,
)
from mlxvlm.errors import ConfigError
from mlxvlm.language.load import translate
from mlxvlm.weights.folder import Checkpoint

MODEL_TYPES = ("eve",)
# How the authors name a layer: patches of 14 pixels, a long side of 672 or 1344.
NAME = re.compile(r"(?:.*/)?eve-patch(\d+)-anypixel-(\d+)/?")
TOWER = "model.vision_tower."
TEACHER = "openai/clip-vit-large-patch14-336"
# Parts of a tensor's name that training alone needs.
TRAINING = ("vision_clip", "vision_tower_clip", "clip_layer", "compressor")
# Of config.json, what is not the language model's.
BESIDE = ("mm_", "image_", "tune_", "freeze_", "use_mm_", "tokenizer_", "requires_")
HEADS = 8
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rename(key: str) -> str | None:
    if any(part in key for part in TRAINING):
        return None
    if key.startswith(TOWER):
        return "vision.embeddings." + key.removeprefix(TOWER)
    if key.startswith("model.mm_projector."):
        number, _, rest = key.removeprefix("model.mm_projector.").partition(".")
        return f"projector.linear_{ {'0': 1, '2': 2}.get(number, number) }.{rest}"
    return "language." + key


def choices(
    name: str, width: int = 1024, teacher: str = TEACHER, heads: int = HEADS
) -> tuple[VisionConfig, TilingConfig]:
    """The layer that the authors call `name`, and its tiling; ConfigError for another name."""
    found = NAME.fullmatch(name)
    if not found:
        raise ConfigError(
            f"mm_vision_tower (={name}) must be a name like openai/eve-patch14-anypixel-672."
        )
    patch, size = int(found[1]), int(found[2])
    vision = VisionConfig(
        model_type=EVE,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        teacher=teacher,
    )
    return vision, TilingConfig(type="whole", image_size=size, patch_size=patch)


def model(checkpoint: Checkpoint) -> ModelConfig:
    raw = checkpoint.config
    kind = raw.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ConfigError(f"mm_projector_type (={kind!r}) is not supported: only mlp2x_gelu.")
    width = int(raw.get("mm_hidden_size", 1024))
    teacher = raw.get("mm_vision_tower_clip") or TEACHER
    vision, tiling = choices(str(raw.get("mm_vision_tower", "")), width, str(teacher))
    language: dict[str, Any] = {k: v for k, v in raw.items() if not k.startswith(BESIDE)}
    language["model_type"] = "llama"
    return ModelConfig(
        tiling=tiling,
        vision=vision,
        projector=ProjectorConfig(type="mlp"),
        # There is no token for pictures (-200 there): the first id beyond the table.
        prompt=PromptConfig(
            layout="vicuna_v1", merge="rows", image_token_id=int(raw["vocab_size"])
        ),
        language=translate(language),
    )
