"""A language model from its config.json, through mlx-lm, with nothing lost on the way.

mlx-lm builds a decoder from the fields that it knows and drops the rest in silence. Three things
are mended here: newer names are translated into those it reads (`rope_parameters`), a field that
would change the numbers is refused, and decoders that take no `input_embeddings` learn to.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError

# What transformers takes where a config.json is silent. mlx-lm's own defaults differ in places: it
# ties the embeddings of a Llama, and gives Qwen2 a rope_theta of 1e6.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "glm": {"tie_word_embeddings": False},
    "granite": {"tie_word_embeddings": False},
}

# Fields that say nothing about the numbers of one forward pass.
HARMLESS = frozenset(
    """_attn_implementation _name_or_path architectures attention_dropout attn_pdrop auto_map
    bos_token_id chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
    finetuning_task hidden_dropout id2label initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id max_length mlp_dropout model_type num_logits_to_keep
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    problem_type resid_pdrop return_dict router_aux_loss_coef task_specific_params
    torch_dtype transformers_version use_cache attn_implementation
    max_position_embeddings tie_word_embeddings cache_implementation is_llama_config
    transformers.js_config tokenizer_class tokenizer_padding_side model_max_length
    max_sequence_length use_bfloat16 diversity_penalty length_penalty num_beams num_beam_groups
    num_return_sequences repetition_penalty temperature top_k top_p typical_p""".split()
)

# What mlx-lm's class computes, where the config may not choose; the others are SwiGLU.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gemma": ("gelu_pytorch_tanh", "gelu"),
    "gemma2": ("gelu_pytorch_tanh",),
    "gemma3_text": ("gelu_pytorch_tanh",),
    "gpt_neox": ("gelu",),
    "phi": ("gelu_new",),
    "starcoder2": ("gelu_pytorch_tanh",),
}
SILU = ("silu", "swish")

# Trunks that multiply `input_embeddings` in place, which is the caller's own array.
SCALE_IN_PLACE = ("Gemma3Model",)

WIDTHS = ("hidden_size", "n_embd", "d_model", "model_dim")


def build_language(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's Model for a language model's config.json, with random weights.

    Whatever the decoder, `lm(ids, cache=None, input_embeddings=None)` works: [B, L] ids, and where
    embeddings [B, L, D] are given, those in their stead. Returns logits [B, L, V].
    """
    model_class, args_class = _classes(config)
    config = translate(config)
    try:
        model = model_class(args_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"a language model of type {config['model_type']!r} cannot be built from its config: "
            f"{error}."
        ) from None
    if "input_embeddings" not in inspect.signature(model_class.__call__).parameters:
        _take_embeddings(model)
    for _, module in model.named_modules():
        if type(module).__name__ in SCALE_IN_PLACE:
            _mix(_Untouched, module)
    return model


def language_width(config: dict[str, Any]) -> int:
    """Width of the token embeddings that a language model's config.json describes."""
    config = {**DEFAULTS.get(config.get("model_type", ""), {}), **config}
    for name in WIDTHS:
        if name in config:
            if not isinstance(config[name], int) or config[name] < 1:
                raise ConfigError(f"the language model's {name} (={config[name]!r}) is no width.")
            return config[name]
    if isinstance(config.get("text_config"), dict):
        return language_width(config["text_config"])
    raise ConfigError(f"the language model's config gives no {WIDTHS[0]}.")


def translate(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the terms of mlx-lm's class; translating twice changes nothing.

    Raises ConfigError naming every field that the class would drop although it changes the numbers.
    """
    config = dict(config)
    fields = set(inspect.signature(_classes(config)[1]).parameters)
    if isinstance(config.get("text_config"), dict) and "text_config" in fields:
        if "model_type" in config["text_config"]:
            config["text_config"] = translate(config["text_config"])
        return config  # a wrapper of mlx-lm's: it reads the decoder's fields from the inner dict
    _rope(config, fields)
    for name, value in DEFAULTS.get(config["model_type"], {}).items():
        config.setdefault(name, value)
    _windows(config, fields)
    kinds = set(config.get("layer_types") or ())
    odd = config["model_type"] in ("llama", "mistral") and kinds - {
        "full_attention",
        "sliding_attention",
    }
    lost = {
        name: value
        for name, value in config.items()
        if (name not in fields and name not in HARMLESS and not _off(name, value, config))
        or (name == "layer_types" and odd)  # its class takes any other kind for full attention
    }
    if lost:
        raise ConfigError(
            f"mlx-lm's {config['model_type']!r} would ignore "
            + ", ".join(f"{name} (={_short(value)})" for name, value in sorted(lost.items()))
            + ", which can change what the model computes. Choose another language model, or "
            "remove the field from its config.json if you know it to mean nothing."
        )
    return config


def _classes(config: dict[str, Any]) -> tuple[Any, Any]:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.replace("-", "_").isidentifier():
        raise ConfigError(f"the language model's config gives no usable model_type (={kind!r}).")
    if config.get("model_file"):
        raise ConfigError(
            f"this language model asks to run its own code ({config['model_file']!r}), "
            "which is never done. Choose one that mlx-lm itself supports."
        )
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)
    except (ValueError, AttributeError):
        raise ConfigError(
            f"language models of type {kind!r} are not known to mlx-lm {mlx_lm_version()}. Choose "
            "one of a family that it supports (llama, mistral, qwen2, qwen3, gemma3_text, phi3, "
            "...)."
        ) from None


def mlx_lm_version() -> str:
    """The release of mlx-lm that is installed."""
    return str(importlib.import_module("mlx_lm").__version__)


def _rope(config: dict[str, Any], fields: set[str]) -> None:
    """`rope_parameters` (transformers 5) into rope_theta, rope_scaling and their kin."""
    rope = config.get("rope_parameters")
    if rope is None or "rope_parameters" in fields:
        return
    rope = dict(rope)
    if isinstance(rope.get("full_attention"), dict):
        local = dict(rope.get("sliding_attention") or rope["full_attention"])
        rope = dict(rope["full_attention"])
        if local != rope and "rope_local_base_freq" not in fields:
            return  # left in place, and refused by name
        if local.get("rope_type", "default") != "default":
            return
        config["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
    del config["rope_parameters"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name in rope and name in fields:
            config[name] = rope[name]
        elif name == "partial_rotary_factor" and name in rope:
            config[name] = rope.pop(name)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Both spellings, because mlx-lm's families differ in which one they look for.
    config["rope_scaling"] = (
        None if kind == "default" else {**rope, "type": kind, "rope_type": kind}
    )


def _windows(config: dict[str, Any], fields: set[str]) -> None:
    """Sliding windows: in the class's own terms, or as a limit on the length."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window = None
        for name in ("sliding_window", "max_window_layers", "use_sliding_window"):
            if name not in fields:
                config.pop(name, None)
    if "sliding_window_pattern" in fields:  # gemma3: every n-th layer sees everything
        if kinds is not None:
            config.pop("layer_types")
            pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
            found = (
                [
                    "sliding_attention" if (i + 1) % pattern else "full_attention"
                    for i in range(len(kinds))
                ]
                if pattern
                else []
            )
            if found != kinds:
                config["layer_types"] = kinds  # refused by name
            else:
                config["sliding_window_pattern"] = pattern
        config.pop("_sliding_window_pattern", None)
        return
    mixed = kinds is not None and set(kinds) == {"sliding_attention", "full_attention"}
    if mixed and {"layer_types", "sliding_window"} <= fields:
        return
    if kinds is not None and set(kinds) <= {"sliding_attention", "full_attention"}:
        if "sliding_attention" not in kinds:
            window = None
        config.pop("layer_types")
    elif config["model_type"] == "llama":
        window = None  # as in transformers, where a Llama without layer_types has no window
    if "layer_types" not in config and (
        "sliding_window" not in fields or {"layer_types", "sliding_window"} <= fields
    ):
        config.pop("sliding_window", None)
        longest = config.get("max_position_embeddings")
        if window and (longest is None or longest > window):
            # The class attends to everything, which is the same up to the window's length.
            config["max_position_embeddings"] = window


def _off(name: str, value: Any, config: dict[str, Any]) -> bool:
    """Whether a field that the class does not know is at a value that means "not used"."""
    if name in ("hidden_act", "hidden_activation"):
        return value is None or value in ACTIVATIONS.get(config["model_type"], SILU)
    if name == "head_dim":
        heads = config.get("num_attention_heads")
        return bool(heads) and value * heads == language_width(config)
    if name == "partial_rotary_factor":
        return value in (None, 1, 1.0)
    if name == "num_key_value_heads":
        return value in (None, config.get("num_attention_heads"))
    if name == "rope_theta":
        return value in (None, 10000)
    if name == "attention_bias" and config["model_type"] == "gpt_neox":
        return value is True
    if name == "intermediate_size" and config["model_type"] == "gpt_neox":
        return value == 4 * language_width(config)
    if name.startswith(("_", "unsloth_")):  # notes of the tools that wrote the file
        return name != "_sliding_window_pattern"
    return not value  # None, False, 0, empty


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Embeddings:
    """Mixed into an embedding: ids are looked up, floating input passes through unchanged."""

    def __call__(self, x: mx.array) -> mx.array:
        if mx.issubdtype(x.dtype, mx.floating):
            return x
        return super().__call__(x)  # type: ignore[misc]

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _mix(_Embeddings, super().to_quantized(*args, **kwargs))  # type: ignore[misc]


class _Decoder:
    """Mixed into a decoder whose own call takes ids alone."""

    def __call__(
        self, inputs: Any, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        inputs = inputs if input_embeddings is None else input_embeddings
        return super().__call__(inputs, cache=cache)  # type: ignore[misc]


class _Untouched:
    """Mixed into a trunk that would change the embeddings it is given."""

    def __call__(
        self, inputs: Any, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        own = None if input_embeddings is None else input_embeddings[:]
        return super().__call__(inputs, cache, own)  # type: ignore[misc]


def _mix(mixin: type, module: nn.Module) -> nn.Module:
    # The class keeps its name: isinstance, parameter names and messages are unchanged.
    base = type(module)
    module.__class__ = type(base.__name__, (mixin, base), {"__module__": base.__module__})
    return module


def _take_embeddings(model: nn.Module) -> None:
    embeddings = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "layers." not in name
    ]
    if len(embeddings) != 1 or "cache" not in inspect.signature(type(model).__call__).parameters:
        raise ConfigError(
            f"language models of type {model.model_type!r} cannot be fed pictures: mlx-lm's class "
            "takes no input embeddings, and its embedding table cannot be told. Choose another."
        )
    _mix(_Embeddings, embeddings[0])
    _mix(_Decoder, model)
