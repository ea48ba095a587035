"""A model's parts made ready for a run: what trains is unfrozen and cast, adapters are put on.

In place, and lazily: no weight is read before somebody asks for its value.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..config import LoRAConfig
from ..errors import ConfigError
from ..language.forward import blocks_of
from ..language.lora import add_lora, add_vision_lora, matching
from ..model import VLM
from ..vision.blocks import set_drop_path
from .stages import TrainConfig


def prepare_parts(vlm: VLM, config: TrainConfig) -> tuple[LoRAConfig | None, LoRAConfig | None]:
    """The adapters of the language model and of the vision tower, where `--train` names them."""
    parts = config.parts
    vlm.freeze()
    if "projector" in parts:
        vlm.projector.unfreeze()
        vlm.projector.set_dtype(mx.float32)
    for part, name in (("lm", "language"), ("vision", "vision")):
        if part not in parts:
            continue
        module = vlm[name]
        if any("scales" in m for m in module.modules()):
            what = "language model" if part == "lm" else "vision tower"
            raise ConfigError(
                f"a quantised {what} cannot be trained itself; train adapters on it with "
                f"--train lora:{part}, or start from an unquantised one."
            )
        module.unfreeze()
        # float32 masters: a bf16 weight would swallow most updates at these learning rates.
        module.set_dtype(mx.float32)
    if "vision" in parts:
        _freeze_unused(vlm.vision)
    if config.trains_vision:
        set_drop_path(vlm.vision, config.vision_drop_path)
    return _add_adapters(vlm, config)


def _add_adapters(vlm: VLM, config: TrainConfig) -> tuple[LoRAConfig | None, LoRAConfig | None]:
    """On the language model, the tower or both; a key need be one of theirs only."""
    blocks: dict[str, list[Any]] = {}
    if "lora:lm" in config.parts:
        blocks["lora:lm"] = blocks_of(vlm.language)
    if "lora:vision" in config.parts:
        blocks["lora:vision"] = vlm.vision.encoder.layers
    wanted = {part: config.lora() for part in blocks}
    for part, lora in wanted.items():
        if lora.keys is None:
            continue
        others = [blocks[other] for other in wanted if other != part]
        elsewhere = {k for k in lora.keys for o in others if matching([k], o)}
        lora.keys = [k for k in lora.keys if matching([k], blocks[part]) or k not in elsewhere]
        if not lora.keys:
            raise ConfigError(f"--lora-keys (={config.lora_keys}) names no layer for {part}.")
    if (lora := wanted.get("lora:lm")) is not None:
        add_lora(vlm.language, lora)
    if (lora := wanted.get("lora:vision")) is not None:
        lora.num_layers = -1
        add_vision_lora(vlm.vision, lora)
    return wanted.get("lora:lm"), wanted.get("lora:vision")


def _freeze_unused(vision: Any) -> None:
    """Of a tower that trains, what its features do not come from: weight decay would wear it."""
    for path, module in vision.named_modules():
        for name, value in list(module.items()):
            if isinstance(value, mx.array) and not vision.feeds_features(f"{path}.{name}"):
                module.freeze(recurse=False, keys=[name])
