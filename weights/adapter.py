"""Adapters on disk: mlx-lm's two files, and what else was trained beside them.

    adapters.safetensors          the language model's; with adapter_config.json it is what
    adapter_config.json           `mlx_lm.load(base, adapter_path=)` reads
    projector.safetensors         a projector that was trained with them
    vision_adapters.safetensors   the vision tower's; adapter_config.json has their `vision` entry
    vision.safetensors            a vision tower that was itself trained with them

The last three are files of their own because mlx-lm would refuse their tensors in its file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.config import LoRAConfig, ModelConfig, read_dataclass, read_json
from mlxvlm.durable import sync_path
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.language.lora import adapter_parameters, add_lora, add_vision_lora
from mlxvlm.weights.check import check
from mlxvlm.weights.folder import ADAPTERS, PROJECTOR, VISION, VISION_ADAPTERS
from mlxvlm.weights.save import room_beside

if TYPE_CHECKING:
    from mlxvlm.model import VLM

ADAPTER_CONFIG = "adapter_config.json"


def save_adapter(
    vlm: VLM,
    config: LoRAConfig | None,
    folder: str | Path,
    projector: bool = True,
    vision: LoRAConfig | None = None,
    tower: bool = False,
) -> None:
    """Writes the adapters and their config, and what was trained beside them.

    config: the language model's adapters; vision: the tower's; None where there are none.
    projector, tower: whether these themselves were trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = _described(config) if config else {}
    if vision:
        described["vision"] = _described(vision)
    described["trained_on"] = _choices(vlm.config)
    weights: dict[str, dict[str, mx.array]] = {}
    if config:
        weights[ADAPTERS] = adapter_parameters(vlm.language)
    if vision:
        weights[VISION_ADAPTERS] = adapter_parameters(vlm.vision)
    if projector:
        weights[PROJECTOR] = dict(tree_flatten(vlm.projector.parameters()))
    if tower:
        weights[VISION] = dict(tree_flatten(vlm.vision.parameters()))
    with room_beside(folder) as beside:
        for name, arrays in weights.items():
            mx.save_safetensors(str(beside / name), arrays)
        (beside / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        names = [file.name for file in beside.iterdir()]
        for name in names:
            sync_path(beside / name)
        for name in (ADAPTERS, VISION_ADAPTERS, PROJECTOR, VISION):
            if name not in names:  # an earlier run's would be loaded with these
                (folder / name).unlink(missing_ok=True)
        for name in names:
            os.replace(beside / name, folder / name)
    sync_path(folder)


def load_adapter(vlm: VLM, folder: str | Path) -> None:
    """Puts the adapters of a folder, and what was trained beside them, onto a loaded model."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (ADAPTERS, VISION_ADAPTERS)):
        raise WeightsError(f"{folder} has no {ADAPTERS}; give the folder that `mlxvlm lora` wrote.")
    raw = read_json(folder / ADAPTER_CONFIG)
    if trained_on := raw.get("trained_on"):
        # As configs, so that a field which they do not name yet is at its default.
        theirs = _choices(ModelConfig.from_dict({**ModelConfig().to_dict(), **trained_on}))
        # The stage that made them may have laid pictures and prompts out in its own way.
        vlm.config.override(theirs["tiling"]["resize"], theirs["prompt"]["layout"])
        ours = _choices(vlm.config)
        if other := sorted(name for name in ours if theirs[name] != ours[name]):
            raise WeightsError(
                f"the adapters in {folder} were trained on another model: its {', '.join(other)} "
                "differ. Give the model that `mlxvlm lora` started from."
            )
    if (folder / ADAPTERS).is_file():
        add_lora(vlm.language, _config(raw, folder))
        load_into(vlm.language, adapter_parameters(vlm.language), folder / ADAPTERS)
    # The tower before its adapters: DoRA's magnitudes come from it.
    for module, name in ((vlm.projector, PROJECTOR), (vlm.vision, VISION)):
        if (folder / name).is_file():
            load_into(module, dict(tree_flatten(module.parameters())), folder / name)
    if (folder / VISION_ADAPTERS).is_file():
        add_vision_lora(vlm.vision, _config(raw.get("vision") or {}, folder))
        load_into(vlm.vision, adapter_parameters(vlm.vision), folder / VISION_ADAPTERS)


def _described(config: LoRAConfig) -> dict[str, Any]:
    """A LoRAConfig in mlx-lm's words."""
    raw = asdict(config)
    kind = "dora" if raw.pop("dora") else "lora"
    return {
        "fine_tune_type": kind,
        "num_layers": raw.pop("num_layers"),
        "lora_parameters": raw,
    }


def _config(raw: dict[str, Any], folder: Path) -> LoRAConfig:
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(f"{folder}: adapters of type {kind!r} cannot be loaded.")
    parameters = {**raw.get("lora_parameters", {}), "num_layers": raw.get("num_layers", -1)}
    return read_dataclass(LoRAConfig, {**parameters, "dora": kind == "dora"}, "lora_parameters")


def _choices(config: ModelConfig) -> dict[str, Any]:
    """The five choices; adapters fit a model and its quantised copy alike."""
    raw = json.loads(json.dumps(config.to_dict()))
    return {name: raw[name] for name in ("tiling", "vision", "projector", "prompt", "language")}


def load_into(module: nn.Module, wanted: dict[str, mx.array], path: Path) -> None:
    """Fills exactly the `wanted` parameters of a module from a file, or names what does not fit."""
    try:
        found = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}.") from None
    assert isinstance(found, dict)
    check({name: tuple(v.shape) for name, v in wanted.items()}, found, str(path))
    module.load_weights(list(found.items()), strict=False)
    mx.eval(module.parameters())
