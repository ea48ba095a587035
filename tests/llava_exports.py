"""What LLaVA's trainer leaves of a run: a projector, or adapters and a projector, and a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import Tensors, old_rope, read, rename, write

LLAVA = Path(__file__).parent / "golden" / "llava"
RANK, ALPHA = 3, 6
VOCAB = 512  # the golden one has fewer rows than its tokenizer has ids
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parts(folder: Path, bare: bool = False) -> tuple[dict[str, Any], Tensors]:
    """The golden LLaVA's language model and tower as folders `language` and `tower`; and
    config.json and projector as LLaVA's trainer writes them. bare: a tower whose names have no
    `vision_model.`, as transformers 5 has them."""
    config, tensors = read(LLAVA)
    tensors = {name: value.astype(mx.float32) for name, value in tensors.items()}
    text = config["text_config"]
    old_rope(text)
    prefix = "" if bare else "vision_model."
    tower = {
        prefix + name.removeprefix("vision_tower."): value
        for name, value in tensors.items()
        if name.startswith("vision_tower.")
    }
    processor = json.loads((LLAVA / "preprocessor_config.json").read_text())
    write(folder / "tower", config["vision_config"], tower, preprocessor_config=processor)
    language = rename(tensors, "language_model.", "")
    language = {k: v for k, v in language.items() if k.startswith(("model.", "lm_head."))}
    text["vocab_size"] = VOCAB
    rng = np.random.default_rng(7)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = rng.standard_normal((VOCAB, language[name].shape[1]), np.float32)
        language[name] = mx.array(rows)
    write(folder / "language", text, language)
    projector = {
        f"model.mm_projector.{number}.{leaf}": tensors[f"multi_modal_projector.{name}.{leaf}"]
        for number, name in ((0, "linear_1"), (2, "linear_2"))
        for leaf in ("weight", "bias")
    }
    raw = {
        **text,
        "_name_or_path": str(folder / "language"),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(folder / "tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": True,
        "tokenizer_model_max_length": 2048,
    }
    return raw, projector


def adapters(language: Tensors, seed: int = 0, targets: tuple[str, ...] = TARGETS) -> Tensors:
    """Random pairs for every layer of a checkpoint that `targets` name, as PEFT calls them."""
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for name, weight in sorted(language.items()):
        layer = name.removesuffix(".weight")
        if name == layer or not layer.endswith(tuple(f".{target}" for target in targets)):
            continue
        rows, columns = weight.shape
        for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = rng.standard_normal(shape, np.float32) / 4
            out[f"base_model.model.{layer}.lora_{part}.weight"] = mx.array(values)
    return out


def write_adapters(folder: Path, base: str, tensors: Tensors, **changes: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors; changes: of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(TARGETS),
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return folder


def projector_export(place: Path, **changes: Any) -> Path:
    """A first stage's folder; changes: of config.json, None removes."""
    raw, projector = parts(place)
    raw = {k: v for k, v in (raw | changes).items() if k not in changes or v is not None}
    return _folder(place / "llava-pretrain", raw, {"mm_projector": projector})


def lora_export(place: Path, **changes: Any) -> Path:
    """A LoRA stage's folder; changes: of adapter_config.json."""
    raw, projector = parts(place)
    rest = {"base_model.model." + name: value for name, value in projector.items()}
    folder = _folder(place / "llava-lora", raw, {"non_lora_trainables": rest})
    pairs = adapters(read(place / "language")[1])
    return write_adapters(folder, str(place / "language"), pairs, **changes)


def merged(language: Tensors, pairs: Tensors, scale: float = ALPHA / RANK) -> Tensors:
    """The language model with the adapters in its weights, summed in float64."""
    out = dict(language)
    for name, a in pairs.items():
        if ".lora_A." not in name:
            continue
        key = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        b = np.array(pairs[name.replace(".lora_A.", ".lora_B.")], np.float64)
        total = np.array(language[key], np.float64) + scale * b @ np.array(a, np.float64)
        out[key] = mx.array(total.astype(np.float32))
    return out


def whole(place: Path, language: Tensors | None = None) -> Path:
    """All parts as one of LLaVA's own whole checkpoints, its tower apart."""
    raw, projector = parts(place)
    return write(place / "whole", raw, (language or read(place / "language")[1]) | projector)


def _folder(folder: Path, raw: dict[str, Any], files: dict[str, Tensors]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for stem, tensors in files.items():
        mx.save_safetensors(str(folder / f"{stem}.safetensors"), tensors, {"format": "pt"})
    return folder
