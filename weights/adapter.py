"""Adapters on disk: mlx-lm's two files, and the projector beside them.

`adapters.safetensors` and `adapter_config.json` are what `mlx_lm.load(base, adapter_path=)` reads.
A projector trained with them lies in `projector.safetensors`: mlx-lm would refuse it in its file.
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

from mlxvlm.config import LoRAConfig, read_dataclass, read_json
from mlxvlm.durable import sync_path
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.language.lora import adapter_parameters, add_lora
from mlxvlm.weights.check import check
from mlxvlm.weights.folder import ADAPTERS
from mlxvlm.weights.save import room_beside

if TYPE_CHECKING:
    from mlxvlm.model import VLM

ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR = "projector.safetensors"


def save_adapter(vlm: VLM, config: LoRAConfig, folder: str | Path, projector: bool = True) -> None:
    """Writes the adapters, their config, and the projector where it was trained too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(config)
    described = {
        "fine_tune_type": "lora",
        "num_layers": raw.pop("num_layers"),
        "lora_parameters": raw,
        "trained_on": _choices(vlm),
    }
    with room_beside(folder) as beside:
        mx.save_safetensors(str(beside / ADAPTERS), adapter_parameters(vlm.language))
        (beside / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        if projector:
            weights = dict(tree_flatten(vlm.projector.parameters()))
            mx.save_safetensors(str(beside / PROJECTOR), weights)
        names = [file.name for file in beside.iterdir()]
        for name in names:
            sync_path(beside / name)
        if not projector:  # an earlier run's would be loaded with these
            (folder / PROJECTOR).unlink(missing_ok=True)
        for name in names:
            os.replace(beside / name, folder / name)
    sync_path(folder)


def load_adapter(vlm: VLM, folder: str | Path) -> LoRAConfig:
    """Puts the adapters of a folder, and its projector if it has one, onto a loaded model."""
    folder = Path(folder)
    if not (folder / ADAPTERS).is_file():
        raise WeightsError(f"{folder} has no {ADAPTERS}; give the folder that `mlxvlm lora` wrote.")
    raw = read_json(folder / ADAPTER_CONFIG)
    if raw.get("fine_tune_type", "lora") != "lora":
        raise ConfigError(f"{folder}: adapters of type {raw['fine_tune_type']!r} cannot be loaded.")
    theirs, ours = raw.get("trained_on"), _choices(vlm)
    if theirs and (other := sorted(name for name in ours if theirs.get(name) != ours[name])):
        raise WeightsError(
            f"the adapters in {folder} were trained on another model: its {', '.join(other)} "
            "differ. Give the model that `mlxvlm lora` started from."
        )
    parameters = {**raw.get("lora_parameters", {}), "num_layers": raw.get("num_layers", -1)}
    config = read_dataclass(LoRAConfig, parameters, "lora_parameters")
    add_lora(vlm.language, config)
    load_into(vlm.language, adapter_parameters(vlm.language), folder / ADAPTERS)
    if (folder / PROJECTOR).is_file():
        projector = dict(tree_flatten(vlm.projector.parameters()))
        load_into(vlm.projector, projector, folder / PROJECTOR)
    return config


def _choices(vlm: VLM) -> dict[str, Any]:
    """The five choices; adapters fit a model and its quantised copy alike."""
    raw = json.loads(json.dumps(vlm.config.to_dict()))
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
