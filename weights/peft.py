"""Adapters as Hugging Face's PEFT writes them, added to a checkpoint's tensors as these are read.

    adapter_config.json         rank, alpha and the layers that have them
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [r, in], .lora_B.weight
                                [out, r], DoRA's .lora_magnitude_vector [out], and tensors that
                                were trained whole, under the names that they have in the base

W + alpha / r B A (Hu et al. 2021), or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023); for DoRA
(Liu et al. 2024) each row of the sum is scaled to its magnitude. Sums are in float32 and rounded
once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxvlm.config import read_json
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.weights.check import report
from mlxvlm.weights.folder import PEFT_ADAPTERS, Checkpoint, Tensor, only_pickles, read_header

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PAIR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.\w+?)??(?:\.weight)?")
# Ways to begin that change the base, which the adapter's own file does not hold.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass
class LowRank:
    """What an adapter adds to one matrix; tensors: its parts by `a`, `b` and `m`."""

    tensors: dict[str, Tensor]
    scale: float

    def added_to(
        self, weight: mx.array, a: mx.array, b: mx.array, m: mx.array | None = None
    ) -> mx.array:
        """weight [out, in], a [r, in], b [out, r], m [out] -> [out, in] in weight's dtype."""
        total = weight.astype(mx.float32)
        total = total + self.scale * (b.astype(mx.float32) @ a.astype(mx.float32))
        if m is not None:
            norms = mx.sqrt(mx.square(total).sum(axis=1))
            total = (m.astype(mx.float32).reshape(-1) / norms)[:, None] * total
        return total.astype(weight.dtype)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds PEFT's adapters, whose config mlx-lm's is named like."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def base_of(folder: Path) -> str:
    """The model that the adapters say they belong to; empty where they do not."""
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def attach(
    checkpoint: Checkpoint, folder: Path, rename: Callable[[str], str | None], prefix: str = ""
) -> None:
    """Adds a folder's adapters to a checkpoint's tensors, or names all that do not fit.

    rename: the family's, from a tensor's name to a parameter's, by which the two sides meet.
    prefix: what stands before the base's own names in the checkpoint.
    """
    raw = read_json(folder / CONFIG)
    _check(raw, folder)
    file = folder / PEFT_ADAPTERS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise only_pickles(folder, ["adapter_model.bin"])
        raise WeightsError(f"{folder} has adapters' config, but no {PEFT_ADAPTERS}.")
    here = {rename(name): name for name in checkpoint.tensors}
    found, whole, unexpected = _read(file, here, rename, prefix)
    misshapen: dict[str, tuple[Any, Any]] = {}
    missing = [
        f"{module}.lora_{part.upper()}"
        for module, parts in found.items()
        for part in ("a", "b")
        if part not in parts
    ]
    for module, parts in found.items():
        if not {"a", "b"} <= parts.keys():
            continue
        name = here[rename(f"{prefix}{module}.weight")]
        tensor = checkpoint.tensors[name]
        if tensor.dtype == "U32":
            raise ConfigError(
                f"{folder} holds adapters for {module}, which is quantised in "
                f"{tensor.file.parent}: give the model in 16 bits that it was made from "
                "(mlxvlm convert -q quantises the sum)."
            )
        rows, columns = parts["b"].shape[0], parts["a"].shape[-1]
        fits = parts["b"].shape[1:] == parts["a"].shape[:1] and len(parts["a"].shape) == 2
        if not fits or tensor.shape != (rows, columns):
            misshapen[f"{module}.lora_B lora_A"] = (tensor.shape, (rows, columns))
        elif "m" in parts and math.prod(parts["m"].shape) != rows:
            misshapen[f"{module}.lora_magnitude_vector"] = ((rows,), parts["m"].shape)
        else:
            scale = _scale(raw, module, parts["a"].shape[0], folder)
            checkpoint.low_rank[name] = LowRank(parts, scale)
    missing += _left_out(raw, found, here, rename, prefix)
    report(str(file), missing=missing, unexpected=unexpected, misshapen=misshapen)
    checkpoint.tensors.update({here[name]: tensor for name, tensor in whole.items()})


def _read(
    file: Path, here: dict[str | None, str], rename: Callable[[str], str | None], prefix: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Layer -> its parts; parameter -> a tensor that was trained whole; names of no use."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    whole: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in read_header(file)[0].items():
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        pair = PAIR.fullmatch(name)
        ours = rename(prefix + (f"{pair[1]}.weight" if pair else name))
        if ours is None or ours not in here:
            unexpected.append(key)
        elif pair:
            part = {"A": "a", "B": "b", "magnitude_vector": "m"}[pair[2]]
            found[pair[1]][part] = tensor
        else:
            whole[ours] = tensor
    return found, whole, unexpected


def _left_out(
    raw: dict[str, Any],
    found: dict[str, dict[str, Tensor]],
    here: dict[str | None, str],
    rename: Callable[[str], str | None],
    prefix: str,
) -> list[str]:
    """Layers that the config names, beside others of that name which have adapters."""
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or raw.get("layers_to_transform") is not None:
        return []
    if raw.get("exclude_modules"):
        return []
    ends = {f".{target}.weight" for target in targets if isinstance(target, str)}
    got = {rename(f"{prefix}{module}.weight") for module in found}
    # Only of the part that has adapters: a tower's layers are called as a language model's are.
    parts = {str(name).split(".")[0] for name in got}
    return [
        f"{name.removesuffix('.weight')}.lora_A"
        for name in here
        if name is not None
        and name.endswith(tuple(ends))
        and name.split(".")[0] in parts
        and name not in got
    ]


def _check(raw: dict[str, Any], folder: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder} holds adapters of type {raw.get('peft_type')!r}; only LORA can be merged."
        )
    for name in ("fan_in_fan_out", "layer_replication", "use_qalora", "megatron_config"):
        if raw.get(name):
            raise ConfigError(f"{folder}: adapters with {name} are not supported.")
    begun = raw.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"{folder}: adapters begun by {begun!r} belong to a base that was changed with them; "
            "merge them with PEFT, and give the whole."
        )


def _scale(raw: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    alpha = raw.get("lora_alpha", 8)
    try:
        for pattern, value in (raw.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    except (re.error, TypeError, ValueError, ZeroDivisionError, AttributeError):
        raise ConfigError(
            f"{folder / CONFIG} gives no usable alpha and rank for {module}."
        ) from None
