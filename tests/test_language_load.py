"""language/load.py: any decoder from its config, fed by embeddings, with no field lost."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxvlm.errors import ConfigError
from mlxvlm.language.forward import embedding
from mlxvlm.language.load import build_language, language_width, translate

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window_pattern": 2, "sliding_window": 4},
    "internlm2": {},
    "phi3": {},
}


def config(kind: str = "llama", **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **TINY, **KINDS.get(kind, {}), **fields}


def flat(lm: nn.Module) -> Any:
    return tree_flatten(lm.parameters())


def difference(a: Any, b: Any) -> float:
    return float(mx.abs(a - b).max())


@pytest.mark.parametrize("quantised", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_stand_for_ids(kind: str, quantised: bool) -> None:
    lm = build_language(config(kind))
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    raw = module.Model(module.ModelArgs.from_dict(translate(config(kind))))
    names = set(dict(flat(raw)))
    if quantised:
        nn.quantize(lm, group_size=32, bits=8)
    ids = mx.array([[3, 9, 1, 7, 7], [5, 0, 2, 63, 8]])
    embeddings = embedding(lm)(ids)
    logits = lm(ids)
    assert logits.shape == (2, 5, 64) and mx.std(logits).item() > 0
    assert mx.array_equal(logits, lm(ids, input_embeddings=embeddings)).item()
    # With a cache, and with embeddings that no id has.
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(lm)
    first = lm(ids[:, :3], cache=cache, input_embeddings=embeddings[:, :3])
    rest = lm(ids[:, 3:], cache=cache, input_embeddings=embeddings[:, 3:])
    assert difference(mx.concatenate([first, rest], axis=1), logits) < 1e-4
    assert difference(lm(ids, input_embeddings=embeddings + 1), logits) > 1e-3
    if not quantised:
        # The module stays one of mlx-lm's, with its own names.
        assert type(lm).__name__ == "Model" and names == set(dict(flat(lm)))


def test_internlm2_keeps_embeddings_through_lora_and_quantisation() -> None:
    lm = build_language(config("internlm2"))
    nn.quantize(lm, group_size=32, bits=4)
    table = embedding(lm)
    assert isinstance(table, nn.QuantizedEmbedding)
    x = mx.random.normal((1, 3, 32))
    assert mx.array_equal(table(x), x).item()


def test_rope_parameters_are_what_the_older_fields_were() -> None:
    old = config(rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=False)
    new = config(rope_parameters={**LLAMA3, "rope_theta": 5e5}, tie_word_embeddings=False)
    a, b, plain = (build_language(c) for c in (old, new, config()))
    b.update(a.parameters())
    plain.update(a.parameters())
    ids = mx.arange(60)[None]
    assert mx.array_equal(a(ids), b(ids)).item()
    assert difference(a(ids), plain(ids)) > 1e-3  # the trap that this is about
    translated = translate(new)
    assert "rope_parameters" not in translated and translated["rope_theta"] == 5e5
    assert translated["rope_scaling"]["rope_type"] == translated["rope_scaling"]["type"] == "llama3"


def test_default_rope_parameters_of_families() -> None:
    default = {"rope_theta": 7e4, "rope_type": "default"}
    for kind in ("llama", "qwen2", "phi3", "internlm2"):
        assert translate(config(kind, rope_parameters=default))["rope_theta"] == 7e4
    layers = ["sliding_attention", "full_attention"]
    local = {"full_attention": {**default, "rope_theta": 1e6}, "sliding_attention": default}
    gemma = translate(
        config("gemma3_text", sliding_window_pattern=9, rope_parameters=local, layer_types=layers)
    )
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 7e4)
    assert gemma["sliding_window_pattern"] == 2 and "layer_types" not in gemma


@pytest.mark.parametrize(
    "fields",
    (
        {},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"layer_types": ["full_attention"] * 2, "attention_bias": False},
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
)
@pytest.mark.parametrize("kind", ("llama", "mistral"))
def test_translating_twice_changes_nothing(kind: str, fields: dict[str, Any]) -> None:
    once = translate(config(kind, **fields))
    assert translate(once) == once


def test_ties_and_theta_are_transformers_where_the_config_is_silent() -> None:
    # mlx-lm would tie a Llama, and turn Qwen2 by 1e6.
    assert "lm_head" in build_language(config("llama"))
    assert "lm_head" not in build_language(config("llama", tie_word_embeddings=True))
    assert "lm_head" in build_language(config("qwen2"))
    assert build_language(config("qwen2")).args.rope_theta == 10000


def test_windows() -> None:
    # Mistral's window covers every layer, which mlx-lm's class does not do: exact up to its length.
    mistral = translate(config("mistral", sliding_window=32))
    assert mistral["max_position_embeddings"] == 32 and "sliding_window" not in mistral
    assert translate(config("mistral", sliding_window=None))["max_position_embeddings"] == 128
    assert translate(config("llama", sliding_window=32))["max_position_embeddings"] == 128
    qwen = config("qwen2", sliding_window=32, use_sliding_window=False, max_window_layers=28)
    assert translate(qwen)["max_position_embeddings"] == 128
    mixed = ["full_attention", "sliding_attention"]
    kept = translate(config("llama", sliding_window=32, layer_types=mixed))
    assert (kept["sliding_window"], kept["layer_types"]) == (32, mixed)
    build_language(kept)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    (
        ("qwen2", "attention_bias", True),
        ("phi3", "sparse_attention", {"block": 4}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "hidden_act", "gelu"),
        ("qwen2", "head_dim", 16),
        ("gemma3_text", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "logit_scale", 0.5),
        ("llama", "layer_types", ["chunked_attention", "full_attention"]),
    ),
)
def test_fields_that_would_be_dropped_are_refused(kind: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field} \(="):
        build_language(config(kind, **{field: value}))


@pytest.mark.parametrize(
    "fields",
    (
        {"hidden_act": "silu", "head_dim": 8, "attention_dropout": 0.1, "use_cache": True},
        {"torch_dtype": "bfloat16", "transformers_version": "4.40", "architectures": ["X"]},
        {"partial_rotary_factor": 1.0, "some_new_switch": False, "some_new_size": None},
        {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "x", "bos_token_id": 1},
    ),
)
def test_harmless_fields_are_taken(fields: dict[str, Any]) -> None:
    build_language(config("qwen2", **fields))


@pytest.mark.parametrize(
    ("raw", "says"),
    (
        ({}, "model_type"),
        ({"model_type": "../evil"}, "model_type"),
        ({"model_type": "base"}, "not known to mlx-lm"),
        ({"model_type": "gpt9"}, "not known to mlx-lm"),
        ({"model_type": "llama", "model_file": "run_me.py"}, "run_me.py.*never done"),
        ({"model_type": "internlm2", "hidden_size": 32}, "cannot be built"),
        ({"model_type": "mamba2"}, "cannot be built"),
    ),
)
def test_what_cannot_be_built(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_language(raw)


def test_width() -> None:
    assert language_width(config()) == 32
    assert language_width({"model_type": "llama"}) == 4096
    assert language_width({"model_type": "gpt2", "n_embd": 12}) == 12
    assert language_width({"model_type": "x", "text_config": {"hidden_size": 5}}) == 5
    for bad in ({"model_type": "x"}, {"model_type": "x", "hidden_size": "a"}):
        with pytest.raises(ConfigError):
            language_width(bad)
