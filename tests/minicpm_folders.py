"""MiniCPM-Llama3-V 2.5 for tests, in its authors' layout and under Llama3-V's names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import Tensors, read
from tiny_tokenizers import LLAMA3_CONTROL, byte_level, write_folder

CONTROL = (*LLAMA3_CONTROL, "<unk>", "<image>", "</image>", "<slice>", "</slice>")
# Llama3-V's names of the same parts.
NAMES = {"vpm.": "vison.", "resampler.": "projection."}
SIDE, PATCH = 32, 8


class Noise:
    """Random tensors under names."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.tensors: Tensors = {}

    def matrix(self, name: str, *shape: int, scale: float = 1.5) -> None:
        values = self.rng.normal(0, scale * math.prod(shape[1:]) ** -0.5, shape)
        self.tensors[name] = mx.array(values.astype(np.float32))

    def vector(self, name: str, size: int, around: float = 0.0) -> None:
        values = around + self.rng.normal(0, 0.2, size)
        self.tensors[name] = mx.array(values.astype(np.float32))

    def linear(self, name: str, rows: int, columns: int, bias: bool = True) -> None:
        self.matrix(f"{name}.weight", rows, columns)
        if bias:
            self.vector(f"{name}.bias", rows)

    def norm(self, name: str, size: int, bias: bool = True) -> None:
        self.vector(f"{name}.weight", size, 1.0)
        if bias:
            self.vector(f"{name}.bias", size)

    def tower(self, at: str, layers: int, width: int, wide: int) -> None:
        for number in range(layers):
            name = f"{at}.encoder.layers.{number}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.linear(f"{name}.self_attn.{part}", width, width)
            for part in ("layer_norm1", "layer_norm2"):
                self.norm(f"{name}.{part}", width)
            self.linear(f"{name}.mlp.fc1", wide, width)
            self.linear(f"{name}.mlp.fc2", width, wide)
        self.norm(f"{at}.post_layernorm", width)

    def resampler(self, at: str, queries: int, vision: int, width: int) -> None:
        self.matrix(f"{at}.query", queries, width, scale=8)
        self.linear(f"{at}.kv_proj", width, vision, bias=False)
        self.matrix(f"{at}.attn.in_proj_weight", 3 * width, width)
        self.vector(f"{at}.attn.in_proj_bias", 3 * width)
        self.linear(f"{at}.attn.out_proj", width, width)
        for part in ("ln_q", "ln_kv", "ln_post"):
            self.norm(f"{at}.{part}", width)
        self.matrix(f"{at}.proj", width, width)

    def llama(self, at: str, head: str, config: dict[str, Any]) -> None:
        width, wide = config["hidden_size"], config["intermediate_size"]
        keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
        self.matrix(f"{at}.embed_tokens.weight", config["vocab_size"], width)
        for number in range(config["num_hidden_layers"]):
            name = f"{at}.layers.{number}"
            for part, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
                self.linear(f"{name}.self_attn.{part}_proj", rows, width, bias=False)
            for part in ("gate_proj", "up_proj"):
                self.linear(f"{name}.mlp.{part}", wide, width, bias=False)
            self.linear(f"{name}.mlp.down_proj", width, wide, bias=False)
            for part in ("input_layernorm", "post_attention_layernorm"):
                self.norm(f"{name}.{part}", width, bias=False)
        self.norm(f"{at}.norm", width, bias=False)
        self.matrix(f"{head}.weight", config["vocab_size"], width)


def write_minicpm(folder: Path, **changes: Any) -> Path:
    """As on the hub: slices of about 32 x 32 pixels, at most 6, of patches of 8; a table of 10 x 10
    positions; five queries of width 256, two heads. changes: fields of config.json."""
    tokenizer = byte_level(CONTROL)
    config = {
        "model_type": "minicpmv",
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "version": "2.5",
        "query_num": 5,
        "image_size": 448,
        "patch_size": 14,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "mm_use_im_start_end": True,
        "slice_mode": True,
        "slice_config": {
            "max_slice_nums": 6,
            "patch_size": PATCH,
            "scale_resolution": SIDE,
            "model_type": "minicpmv",
        },
        "vision_config": {
            "model_type": "idefics2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 10 * PATCH,
            "patch_size": PATCH,
        },
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": tokenizer.get_vocab_size() + 3,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 128000,
        "torch_dtype": "float16",
        **changes,
    }
    tower = config["vision_config"]
    noise = Noise(7)
    noise.matrix("vpm.embeddings.patch_embedding.weight", 32, 3, PATCH, PATCH)
    noise.vector("vpm.embeddings.patch_embedding.bias", 32)
    noise.matrix("vpm.embeddings.position_embedding.weight", 100, 32, scale=6)
    kept = tower["num_hidden_layers"] - int(config["drop_vision_last_layer"])
    noise.tower("vpm", kept, 32, tower["intermediate_size"])
    noise.resampler("resampler", config["query_num"], 32, 256)
    noise.llama("llm.model", "llm.lm_head", config)
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_folder(folder, tokenizer, config=config, tokenizer_config=settings)
    mx.save_safetensors(str(folder / "model.safetensors"), noise.tensors, {"format": "pt"})
    return folder


def as_llama3v(source: Path, folder: Path) -> Path:
    """The same under the names of Llama3-V's release."""
    shutil.copytree(source, folder)
    config, tensors = read(source)
    config["model_type"] = "llama3v"
    for name in ("version", "batch_vision_input", "drop_vision_last_layer"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    renamed: Tensors = {}
    for name, value in tensors.items():
        for theirs, other in NAMES.items():
            if name.startswith(theirs):
                name = other + name.removeprefix(theirs)
        renamed[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, {"format": "pt"})
    return folder
