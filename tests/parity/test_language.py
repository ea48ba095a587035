"""Decoders through build_language: transformers' logits, from the config.json that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402

from mlxvlm.language.forward import embedding  # noqa: E402
from mlxvlm.language.load import build_language  # noqa: E402

pytestmark = pytest.mark.parity

SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROPES: dict[str, Any] = {
    "default": {"rope_type": "default", "rope_theta": 25000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama-{name}": ("Llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("Phi3", {}),
}
TEXT = {"Gemma3": "Gemma3TextConfig"}


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    family, fields = CASES[name]
    config = getattr(transformers, TEXT.get(family, f"{family}Config"))(**SIZE, **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in key else 0))
    model.save_pretrained(tmp_path)
    lm = build_language(json.loads((tmp_path / "config.json").read_text()))
    weights = mx.load(str(tmp_path / "model.safetensors"))
    lm.load_weights(list((lm.sanitize(weights) if hasattr(lm, "sanitize") else weights).items()))
    ids = np.random.default_rng(0).integers(0, 128, (2, 37))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(ids)).logits.numpy()
    found = np.array(lm(mx.array(ids), input_embeddings=embedding(lm)(mx.array(ids))))
    assert np.abs(wanted).max() > 0.5
    difference = np.abs(found - wanted).max() / max(1, np.abs(wanted).max())
    assert difference < 1e-4, difference
