"""LLaVA-1.5 and -1.6 as their authors save them, and as XTuner exports them ("official" layout).

    model.layers.*  model.embed_tokens.*  model.norm.*  lm_head.*    as in the language model alone
    model.mm_projector.{0,2}.*  model.image_newline
    model.vision_tower.vision_tower.vision_model.*                   often left out

config.json is the language model's, with LLaVA's choices beside (`mm_vision_tower`, `mm_...`). A
tower that was left out is read from the repository, or the folder, that `mm_vision_tower` names.

A run that kept its language model as it was leaves that out too, and holds only what was trained:

    mm_projector.safetensors             its first stage: model.mm_projector.*
    non_lora_trainables.safetensors      its LoRA stage: the projector, with "base_model.model."
      adapter_model.safetensors          before each name, and PEFT's adapters

with config.json as above. Trainers write them as pickles (.bin), which are never opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.config import TILINGS, ModelConfig, ProjectorConfig, PromptConfig, read_json
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.language.load import translate
from mlxvlm.weights import peft
from mlxvlm.weights.elsewhere import Elsewhere
from mlxvlm.weights.families import clip
from mlxvlm.weights.families.llava import LARGE_CLIP
from mlxvlm.weights.families.llava_next import grids
from mlxvlm.weights.families.towers import preprocessing, tower_config, vision_config
from mlxvlm.weights.folder import (
    PEFT_ADAPTERS,
    TRAINED,
    Checkpoint,
    only_pickles,
    weight_files,
    whole_files,
)

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer

# What the language model is, by the whole's model_type.
DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
MODEL_TYPES = tuple(DECODERS)
TOWER = "model.vision_tower.vision_tower."
# A tower whose config need not be looked up.
KNOWN = {"openai/clip-vit-large-patch14-336": LARGE_CLIP}
# Of config.json, what is not the language model's.
BESIDE = (
    "mm_",
    "image_",
    "tune_",
    "freeze_",
    "unfreeze_",
    "use_mm_",
    "tokenizer_",
    "vision_config",
    "quantization",
)


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is in this layout; "llava" is transformers' model_type too."""
    return raw.get("model_type") in MODEL_TYPES and "mm_vision_tower" in raw


def rename(key: str) -> str | None:
    if key.startswith(TOWER):
        return "vision." + key.removeprefix(TOWER).removeprefix("vision_model.")
    if key.startswith("model.mm_projector."):
        number, _, rest = key.removeprefix("model.mm_projector.").partition(".")
        return f"projector.linear_{ {'0': 1, '2': 2}.get(number, number) }.{rest}"
    if key == "model.image_newline":
        return "projector.image_newline"
    if key.startswith(("model.", "lm_head.")):
        return "language." + key
    # Of a tower's own repository.
    return clip.rename(key)


def assemble(
    folder: Path, opened: Callable[[Path], Checkpoint], elsewhere: Elsewhere
) -> Checkpoint:
    """The checkpoint of a folder, with the parts that it leaves out."""
    raw = read_json(folder / "config.json")
    if _holds_a_part(folder):
        checkpoint = _with_base(folder, raw, elsewhere)
    else:
        checkpoint = opened(folder)
    _add_tower(checkpoint, elsewhere)
    return checkpoint


def _holds_a_part(folder: Path) -> bool:
    """Whether a folder has a projector or adapters, and no language model."""
    if whole_files(folder):
        return False
    trained = [name for name in TRAINED if (folder / name).is_file()]
    adapters = peft.is_adapter(folder)
    if not trained and not adapters:
        return False
    wanted = [TRAINED[1], PEFT_ADAPTERS] if adapters else trained
    lacking = [Path(name) for name in wanted if not (folder / name).is_file()]
    pickles = [n for n in (f"{name.stem}.bin" for name in lacking) if (folder / n).is_file()]
    if pickles:
        raise only_pickles(folder, pickles)
    if lacking:
        raise WeightsError(
            f"{folder} holds adapters, and lacks {' and '.join(map(str, lacking))}. On the hub "
            f"that may be a pickle ({lacking[0].stem}.bin), which is not fetched: run hf download "
            "REPO --local-dir DIR, and give DIR to be shown the command that converts it."
        )
    return True


def _with_base(folder: Path, raw: dict[str, Any], elsewhere: Elsewhere) -> Checkpoint:
    """A language model's tensors, and over them what was trained."""
    adapters = peft.is_adapter(folder)
    named = (peft.base_of(folder) if adapters else "") or raw.get("_name_or_path")
    base = elsewhere.find("language", named, folder)
    theirs = read_json(base / "config.json")
    kind, kinds = theirs.get("model_type"), (DECODERS[raw["model_type"]], *MODEL_TYPES)
    if kind not in kinds:
        raise ConfigError(
            f"{base} is of type {kind!r}, and {folder} belongs to a language model of type "
            f"{kinds[0]!r}."
        )
    # Whatever a trainer did to the base in its memory, the tensors are as the base's own say.
    for name in ("quantization", "quantization_config"):
        raw.pop(name, None)
        if name in theirs:
            raw[name] = theirs[name]
    checkpoint = Checkpoint(folder, raw, language=base)
    checkpoint.add(weight_files(base))
    trained = Checkpoint(folder, raw)
    trained.add(folder / name for name in TRAINED if (folder / name).is_file())
    # As LLaVA's loader does (load_pretrained_model in llava/model/builder.py).
    names = [name.removeprefix("base_model.") for name in trained.tensors]
    twice = any(name.startswith("model.model.") for name in names)
    checkpoint.tensors.update(
        (name.removeprefix("model.") if twice else name, tensor)
        for name, tensor in zip(names, trained.tensors.values(), strict=True)
    )
    if adapters:
        peft.attach(checkpoint, folder, rename)
    return checkpoint


def _add_tower(checkpoint: Checkpoint, elsewhere: Elsewhere) -> None:
    """Gives the checkpoint its tower's config, and its tensors where they lie elsewhere."""
    raw = checkpoint.config
    name = elsewhere.vision or raw["mm_vision_tower"]
    if not isinstance(name, str) or not name:
        raise ConfigError(f"mm_vision_tower (={name!r}) must name a repository or a folder.")
    inside = any(key.startswith(TOWER) for key in checkpoint.tensors)
    if inside and name in KNOWN:
        raw["vision_config"] = KNOWN[name]
        return
    folder = elsewhere.find("vision", name, checkpoint.folder)
    tower = Checkpoint(folder, read_json(folder / "config.json"))
    if not inside:
        tower = Checkpoint.open(folder)
        checkpoint.tensors.update(tower.tensors)
    raw["vision_config"] = tower_config(tower.config, name)
    checkpoint.tower = folder


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices; the prompt's layout is `layout`'s."""
    raw = checkpoint.config
    kind = raw.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ConfigError(
            f"mm_projector_type (={kind!r}) is not supported: only mlp2x_gelu, LLaVA-1.5's and "
            "1.6's."
        )
    if raw.get("mm_use_im_start_end"):
        raise ConfigError("mm_use_im_start_end is not supported: LLaVA-1.5 and 1.6 leave it out.")
    select = raw.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise ConfigError(f"mm_vision_select_feature (={select!r}) must be patch or cls_patch.")
    clipped = raw["vision_config"]["model_type"] == "clip_vision_model"
    vision = vision_config(
        raw["vision_config"],
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_norm=False,
        # "patch" drops CLIP's class token; a SigLIP has none.
        vision_feature_select_strategy="default" if clipped and select == "patch" else "full",
    )
    tiling, mean, std = preprocessing(checkpoint.tower or checkpoint.folder, vision)
    aspect = raw.get("image_aspect_ratio", "square")
    merge = "flat"
    if aspect == "pad":
        tiling = tiling.resized("pad", mean)
    elif aspect == "anyres":
        merge = raw.get("mm_patch_merge_type", "flat")
        if merge != "spatial_unpad":
            raise ConfigError(
                f"mm_patch_merge_type (={merge!r}) must be spatial_unpad, LLaVA-1.6's."
            )
        # A pinpoint's width before its height, in LLaVA's order, which decides ties.
        columns_rows = tuple(grids(raw.get("image_grid_pinpoints"), vision.image_size))
        tiling = dataclasses.replace(tiling, **{**TILINGS["anyres"], "grids": columns_rows})
    elif aspect not in ("square", None):
        raise ConfigError(f"image_aspect_ratio (={aspect!r}) must be square, pad or anyres.")
    language = {k: v for k, v in raw.items() if not k.startswith(BESIDE)}
    language["model_type"] = DECODERS[raw["model_type"]]
    language.setdefault("tie_word_embeddings", False)
    return ModelConfig(
        tiling=tiling,
        vision=dataclasses.replace(vision, image_mean=mean, image_std=std),
        projector=ProjectorConfig(type="mlp", hidden_act="gelu", bias=True),
        # There is no token for pictures (LLaVA's -200): the first id beyond the table.
        prompt=PromptConfig(image_token_id=int(raw["vocab_size"]), merge=merge),
        language=translate(language),
    )


def layout(checkpoint: Checkpoint, tokenizer: Tokenizer) -> str:
    """LLaVA's conversation for the language model. A template in the folder is that model's own."""
    if checkpoint.config["model_type"] == "llava_mistral":
        return "mistral"
    if tokenizer.id("<|start_header_id|>") is not None:
        return "llama-3"
    if tokenizer.id("<|im_start|>") is not None and tokenizer.chat_template is not None:
        return "chat_template"
    return "vicuna_v1"
