"""MiniCPM-Llama3-V 2.5 as its authors save it, and Llama3-V's release, its twin under other names.

                  language   tower    resampler      model_type
    MiniCPM       llm.*      vpm.*    resampler.*    minicpmv
    Llama3-V      llm.*      vison.*  projection.*   llama3v

config.json is the language model's, with the other choices beside. No code of a repository is run.
"""

from __future__ import annotations

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
from mlxvlm.weights.families.towers import HALF
from mlxvlm.weights.folder import Checkpoint

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer

MINICPM, LLAMA3V = MODEL_TYPES = ("minicpmv", "llama3v")
PARTS = {
    "llm": "language",
    "vpm": "vision",
    "vison": "vision",
    "resampler": "projector",
    "projection": "projector",
}
HUB_PARTS = {"language": "llm", "vision": "vpm", "projector": "resampler"}
# Positions of patches, which are computed.
COMPUTED = ("projector.pos_embed", "vision.embeddings.position_ids")
# What stands for a visual token.
IMAGE_TOKEN = "<unk>"
# SigLIP-So400m as a NaViT, where config.json leaves a field out.
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 980,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
TOWERS = ("idefics2", "idefics2_vision", "siglip_vision_model")
# Of config.json, what is not the language model's.
BESIDE = (
    "version",
    "query_num",
    "image_size",
    "patch_size",
    "batch_vision_input",
    "drop_vision_last_layer",
    "slice_config",
    "slice_mode",
    "vision_config",
    "mm_use_im_start_end",
    "quantization",
    "quantization_config",
)


def rename(key: str) -> str | None:
    part, _, rest = key.partition(".")
    ours = f"{PARTS[part]}.{rest}" if part in PARTS else key
    return None if ours in COMPUTED else ours


def hub_name(name: str) -> str:
    """A parameter's name in MiniCPM's layout."""
    part, _, rest = name.partition(".")
    return f"{HUB_PARTS[part]}.{rest}"


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices; `find_image_token` has the last word."""
    raw = checkpoint.config
    version = raw.get("version", "2.5" if raw["model_type"] == LLAMA3V else None)
    if str(version) != "2.5":
        raise ConfigError(
            f"{checkpoint.folder} is a MiniCPM-V of version {version}, which is not supported: "
            "only 2.5, MiniCPM-Llama3-V."
        )
    if raw.get("slice_mode", True) is not True:
        raise ConfigError("slice_mode must be true: pictures are cut into slices.")
    language = {k: v for k, v in raw.items() if k not in BESIDE}
    language["model_type"] = "llama"
    language.setdefault("tie_word_embeddings", False)
    cut = raw.get("slice_config") or {}
    side = cut.get("scale_resolution", 448)
    patch = cut.get("patch_size", raw.get("patch_size", 14))
    return ModelConfig(
        tiling=TilingConfig(
            **{
                **TILINGS["slices"],
                "image_size": side,
                "patch_size": patch,
                "max_tiles": cut.get("max_slice_nums", 9),
            }
        ),
        vision=_tower(raw, side),
        projector=ProjectorConfig(type="resampler", num_query_tokens=raw.get("query_num", 96)),
        prompt=PromptConfig(layout="llama-3", merge="minicpm"),
        language=translate(language),
    )


def find_image_token(config: ModelConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sets the id that stands for a visual token, which config.json leaves to the tokenizer."""
    name = tokenizer.special_tokens.get("unk_token", IMAGE_TOKEN)
    if name not in tokenizer.control:
        raise ConfigError(
            f"{checkpoint.folder}: the tokenizer has no {name}, which stands for a visual token. "
            "Take the tokenizer's files from the model's own repository."
        )
    config.prompt.image_token_id = tokenizer.control[name]


def _tower(raw: dict[str, Any], side: int) -> VisionConfig:
    given = raw.get("vision_config") or {}
    kind = given.get("model_type", TOWERS[0])
    if kind not in TOWERS:
        raise ConfigError(
            f"vision_config of type {kind!r} is not supported: only {', '.join(TOWERS)}, a SigLIP "
            "that takes views of any grid."
        )
    known = {name: given.get(name, value) for name, value in TOWER.items()}
    for name, value in known.items():
        if not isinstance(value, type(TOWER[name])):
            raise ConfigError(f"vision {name} (={value!r}) must be like {TOWER[name]!r}.")
    table = known.pop("image_size") // known["patch_size"]
    dropped = raw.get("drop_vision_last_layer", False)
    return VisionConfig(
        **known,
        image_size=side,
        positions="buckets",
        position_grid=table,
        vision_feature_layer=-2 if dropped else -1,
        vision_feature_norm=True,
        image_mean=HALF,
        image_std=HALF,
    )
