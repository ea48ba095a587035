"""LLaVA as XTuner's `xtuner convert pth_to_hf` writes it: each part that was trained in a folder.

    config.json, model*.safetensors   the language model, where all of it was trained; or in llm/
    llm_adapter/                      PEFT's adapters of a language model that lies elsewhere
    visual_encoder/                   the tower, where all of it was trained
    visual_encoder_adapter/           adapters of a tower that lies elsewhere
    projector/                        config.json, and model.{0,2}.* in model.safetensors
    xtuner_config.py                  the run's settings; read as text, never run

Its two exports, "official" LLaVA's and Hugging Face's, are `llava_original`'s and `llava`'s. As in
XTuner's own chat, pictures are padded to a square, and CLIP's class token is dropped.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, read_json
from mlxvlm.errors import ConfigError
from mlxvlm.weights import peft
from mlxvlm.weights.elsewhere import Elsewhere, Part
from mlxvlm.weights.families import clip, llama
from mlxvlm.weights.families.towers import preprocessing, tower_config, vision_config
from mlxvlm.weights.folder import OF_TRAINING, PICKLES, Checkpoint, only_pickles, weight_files

# What config.json says is the language model's: the folders around it tell this layout.
MODEL_TYPES = ()
PROJECTOR = "projector"
SETTINGS = "xtuner_config.py"
# A part's own folders, the one of its adapters, and what the settings call the model it is made of.
PARTS: dict[Part, tuple[tuple[str, ...], str, str]] = {
    "language": (("llm", "."), "llm_adapter", "llm"),
    "vision": (("visual_encoder",), "visual_encoder_adapter", "visual_encoder"),
}
# A token of the projector may be neighbours of the tower's side by side: XTuner's merge ratios.
POOLS = {1: "none", 4: "concat2_columns"}


def is_xtuner(folder: Path) -> bool:
    return (folder / PROJECTOR / "config.json").is_file()


def rename(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part == "llm":
        return "language." + rest
    if part == "visual_encoder":
        return clip.rename(rest)
    number, _, leaf = rest.removeprefix("model.").partition(".")
    return f"projector.linear_{ {'0': 1, '2': 2}.get(number, number) }.{leaf}"


def assemble(folder: Path, elsewhere: Elsewhere) -> Checkpoint:
    """The checkpoint of a folder, with the parts that it leaves out.

    Its config: `language` and `vision_config`, the parts' own; `projector`; `select_layer`.
    """
    _refuse_pickles(folder)
    settings = _settings(folder)
    raw: dict[str, Any] = {"projector": read_json(folder / PROJECTOR / "config.json")}
    raw["select_layer"] = settings.get("visual_select_layer", -2)
    checkpoint = Checkpoint(folder, raw)
    checkpoint.add(weight_files(folder / PROJECTOR), f"{PROJECTOR}.")
    for part, (own, adapter, called) in PARTS.items():
        home = next((f for f in map(folder.joinpath, own) if (f / "config.json").is_file()), None)
        adapters = folder / adapter
        adapted = peft.is_adapter(adapters)
        if home is None:
            named = (peft.base_of(adapters) if adapted else "") or settings.get(called)
            home = elsewhere.find(part, named, folder)
        checkpoint.add(weight_files(home), f"{called}.")
        if adapted:
            peft.attach(checkpoint, adapters, rename, f"{called}.")
        config = read_json(home / "config.json")
        if part == "vision":
            checkpoint.tower, raw["vision_config"] = home, tower_config(config, str(home))
        else:
            checkpoint.language, raw["language"] = home, config
            _take_quantization(raw, config)
    return checkpoint


def model(checkpoint: Checkpoint) -> ModelConfig:
    """The five choices; the prompt's layout is left to who knows the tokenizer."""
    raw = checkpoint.config
    assert checkpoint.tower is not None and checkpoint.language is not None  # by `assemble`
    siglip = raw["vision_config"]["model_type"] == "siglip_vision_model"
    vision = vision_config(
        raw["vision_config"],
        vision_feature_layer=raw["select_layer"],
        vision_feature_norm=False,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    tiling, mean, std = preprocessing(checkpoint.tower, vision)
    language = llama.language(Checkpoint(checkpoint.language, raw["language"]))
    return ModelConfig(
        tiling=tiling.resized("pad", mean),
        vision=dataclasses.replace(vision, image_mean=mean, image_std=std),
        projector=_projector(raw["projector"], vision.hidden_size),
        # There is no token for pictures: the first id beyond the table.
        prompt=PromptConfig(image_token_id=int(language["vocab_size"])),
        language=language,
    )


def _projector(raw: dict[str, Any], width: int) -> ProjectorConfig:
    depth, wide = raw.get("depth", 2), raw.get("visual_hidden_size", width)
    if depth != 2:
        raise ConfigError(f"{PROJECTOR}'s depth (={depth!r}) must be 2.")
    if not isinstance(wide, int) or wide % width or wide // width not in POOLS:
        raise ConfigError(
            f"{PROJECTOR}'s visual_hidden_size (={wide!r}) must be the tower's {width}, or 4 times "
            "that (a token_merge_ratio of 4)."
        )
    return ProjectorConfig(
        type="mlp",
        pool=POOLS[wide // width],
        hidden_act=raw.get("hidden_act", "gelu"),
        bias=raw.get("bias", True),
    )


def _take_quantization(raw: dict[str, Any], language: dict[str, Any]) -> None:
    """The language model's own, its layers under the names that they have here."""
    for name in ("quantization", "quantization_config"):
        if block := language.get(name):
            named = {f"llm.{k}" if isinstance(v, dict) else k: v for k, v in block.items()}
            raw[name] = named


def _refuse_pickles(folder: Path) -> None:
    """All parts that are pickles alone, in one error."""
    names = []
    for name in (".", "llm", "llm_adapter", "visual_encoder", "visual_encoder_adapter", PROJECTOR):
        files = list((folder / name).glob("*")) if (folder / name).is_dir() else []
        if not any(file.suffix == ".safetensors" for file in files):
            names += sorted(
                file.relative_to(folder).as_posix()
                for file in files
                # XTuner's own checkpoints are .pth, and none of the parts.
                if file.suffix in PICKLES
                and file.suffix != ".pth"
                and not file.name.startswith(OF_TRAINING)
            )
    if names:
        raise only_pickles(folder, names)


def _settings(folder: Path) -> dict[str, Any]:
    """Of xtuner_config.py, without running it: the parts' models by name, visual_select_layer."""
    try:
        tree = ast.parse((folder / SETTINGS).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return {}
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _value(node.value, values)
    found = {called: values.get(f"{called}_name_or_path") for _, _, called in PARTS.values()}
    for name, value in _arguments(tree):
        if name == "visual_select_layer" and isinstance(number := _value(value, values), int):
            found[name] = number
        elif name in found and found[name] is None:
            given = dict(_arguments(value))
            if "pretrained_model_name_or_path" in given:
                found[name] = _value(given["pretrained_model_name_or_path"], values)
    return {name: value for name, value in found.items() if value is not None}


def _arguments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Keyword arguments and entries of dicts, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
