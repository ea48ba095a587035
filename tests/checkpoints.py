"""Checkpoints for tests: a LLaVA as transformers 5 saves it, rewritten into the other layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tiny_tokenizers import sentencepiece, write_folder

LAYOUTS = ("transformers5", "memory", "hub", "mlx")
Tensors = dict[str, mx.array]


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    config = json.loads((folder / "config.json").read_text())
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    return config, tensors


def write(
    folder: Path, config: dict[str, Any], tensors: Tensors, writer: str = "pt", **files: Any
) -> Path:
    """A folder: weights, config.json, a small sentencepiece tokenizer, JSON files by stem."""
    write_folder(folder, sentencepiece(), config=config, **files)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": writer})
    return folder


def rewrite(source: Path, folder: Path, layout: str) -> Path:
    """A transformers 5 LLaVA in another of the layouts found in the wild."""
    config, tensors = read(source)
    files = {
        path.stem: json.loads(path.read_text()) for path in source.glob("*processor_config.json")
    }
    if layout in ("hub", "mlx"):
        old_rope(config["text_config"])
        tensors = rename(tensors, "vision_tower.", "vision_tower.vision_model.")
    if layout == "hub":  # buffers that older files carry
        count = tensors["vision_tower.vision_model.embeddings.position_embedding.weight"].shape[0]
        tensors["vision_tower.vision_model.embeddings.position_ids"] = mx.arange(count)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((4,))
        # these files list only what differs from transformers' defaults
        for name, value in {"tie_word_embeddings": False, "hidden_act": "silu"}.items():
            assert config["text_config"].pop(name) == value
        del config["tie_word_embeddings"]
    if layout == "mlx":
        tensors = {k: v for k, v in tensors.items() if ".head." not in k}
        patches = "vision_tower.vision_model.embeddings.patch_embedding.weight"
        tensors[patches] = tensors[patches].transpose(0, 2, 3, 1)
    if layout == "memory":
        tensors = rename(tensors, "language_model.model.", "model.language_model.")
        tensors = rename(tensors, "language_model.lm_head.", "lm_head.")
        tensors = rename(tensors, "vision_tower.", "model.vision_tower.")
        tensors = rename(tensors, "multi_modal_projector.", "model.multi_modal_projector.")
        tensors = rename(tensors, "image_newline", "model.image_newline")
    return write(folder, config, tensors, "mlx" if layout == "mlx" else "pt", **files)


def rename(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}


def old_rope(text: dict[str, Any]) -> None:
    """`rope_parameters` as the two fields that it replaced."""
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None if rope["rope_type"] == "default" else rope


def quantise(
    tensors: Tensors,
    chosen: Callable[[str], bool],
    bits: int = 8,
    group_size: int = 32,
    mode: str = "affine",
) -> tuple[Tensors, Tensors]:
    """The chosen matrices quantised as mlx-lm stores them, and the same values dense."""
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    packed, dense = dict(tensors), dict(tensors)
    for name in [
        n for n in tensors if n.endswith(".weight") and tensors[n].ndim == 2 and chosen(n)
    ]:
        parts = mx.quantize(tensors[name], **settings)  # floating blocks have no biases
        stem = name.removesuffix("weight")
        packed |= {stem + k: v for k, v in zip(("weight", "scales", "biases"), parts, strict=False)}
        dense[name] = mx.dequantize(*parts, **settings).astype(tensors[name].dtype)
    return packed, dense
