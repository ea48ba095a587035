"""From a checkpoint's tensors to a module's parameters: renamed, cast, checked, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.weights.check import finite, report
from mlxvlm.weights.folder import Checkpoint

PATCHES = "patch_embedding.weight"
# A table that is added as a whole, never looked up, is held dense.
DENSE = "position_embedding"
# Modules that run in the tower's dtype: float16 overflows there.
TOWERS = ("vision.", "vision_model.", "text_model.", "logit_")

DTYPE_NAMES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """A dtype from its name; None stays None, which keeps each tensor as it is stored."""
    if dtype is None or isinstance(dtype, mx.Dtype):
        if dtype is not None and dtype not in DTYPE_NAMES.values():
            raise ConfigError(f"dtype (={dtype}) must be one of {', '.join(DTYPE_NAMES)}.")
        return dtype
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype (={dtype!r}) must be one of {', '.join(DTYPE_NAMES)}.")
    return DTYPE_NAMES[dtype]


def cast_dtype(name: str, stored: mx.Dtype, wanted: mx.Dtype | None) -> mx.Dtype:
    """What a tensor becomes: as stored or as wanted, but a vision tower is never float16.

    Its float16 becomes float32, which holds every value of it; bfloat16 would round them.
    """
    if not mx.issubdtype(stored, mx.floating):
        return stored
    dtype = wanted or stored
    if dtype == mx.float16 and name.startswith(TOWERS):
        return mx.float32
    return dtype


def rename_quantization(
    block: dict[str, Any] | None, rename: Callable[[str], str | None]
) -> dict[str, Any] | None:
    """A config's `quantization` block with its modules under our names."""
    if block is None:
        return None
    out: dict[str, Any] = {}
    for name, value in block.items():
        if not isinstance(value, (dict, bool)):
            out[name] = value
        elif isinstance(value, dict) and (ours := rename(name + ".weight")) is not None:
            out[ours.removesuffix(".weight")] = value
    for name in ("group_size", "bits"):
        if not isinstance(out.get(name), int):
            raise ConfigError(f"the quantization block of config.json has no usable {name}.")
    return out


def stored_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization` block of a config.json, or None; schemes not mlx-lm's are refused."""
    block = config.get("quantization") or config.get("quantization_config")
    if block is None and isinstance(config.get("text_config"), dict):
        return stored_quantization(config["text_config"])
    if block is None:
        return None
    if not isinstance(block, dict) or "quant_method" in block:
        method = block.get("quant_method") if isinstance(block, dict) else block
        raise ConfigError(
            f"the tensors are quantised by {method!r}, which is not supported: use the unquantised "
            "model, or one that mlx-lm quantised (mlx-community has many)."
        )
    return block


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str | None],
    *,
    prefixes: tuple[str, ...] = ("",),
    dtype: mx.Dtype | None = None,
    quantization: Mapping[str, Any] | None = None,
    quantise: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Gives a module its parameters, all of them, or raises and names what does not fit.

    rename: a tensor's name in the file -> the parameter's, or None for one that is known to be of
    no use. prefixes: only parameters that start so are filled, and only such tensors are looked at.
    quantise: layers that become quantised as they are read, each with what `to_quantized` takes.
    Values are read one tensor at a time, so memory holds one copy and the tensor at hand.
    """
    quantise = quantise or {}
    where = str(checkpoint.folder)
    weights = fit(module, checkpoint, rename, prefixes, dtype, quantization)
    ready, bad = [], []
    for name in sorted(weights):
        value = weights.pop(name)
        try:
            mx.eval(value)
        except RuntimeError as error:
            raise WeightsError(f"{where}: {name} cannot be read: {error}.") from None
        if not finite(value):
            bad.append(name)
        path = name.removesuffix(".weight")
        if path != name and path in quantise:
            parts = mx.quantize(value, **quantise[path])  # floating blocks have no biases
            mx.eval(parts)
            leaves = ("weight", "scales", "biases")
            ready += [(f"{path}.{leaf}", x) for leaf, x in zip(leaves, parts, strict=False)]
        else:
            ready.append((name, value))
    report(where, not_finite=bad)
    if quantise:
        nn.quantize(module, class_predicate=lambda path, _: dict(quantise.get(path, {})) or False)
    module.load_weights(ready, strict=False)


def fit(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str | None],
    prefixes: tuple[str, ...] = ("",),
    dtype: mx.Dtype | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, mx.array]:
    """The parameters that `fill` gives a module, lazy: none is read before it is evaluated.

    Makes those modules quantised whose tensors are.
    """
    where = str(checkpoint.folder)
    source = _names(checkpoint, rename, prefixes, where)
    raw = checkpoint.read(source.values())
    weights = {name: raw.pop(key) for name, key in source.items()}
    for part in ("language", "vision"):
        weights = _sanitized(module, weights, part)
    weights = {n: _channels_last(n, w, checkpoint.writer) for n, w in weights.items()}
    # Before a quantised table becomes a dense one, so that it is not rounded on the way.
    weights = {n: w.astype(cast_dtype(n, w.dtype, dtype)) for n, w in weights.items()}
    weights = _quantize(module, weights, quantization)
    flat: Any = tree_flatten(module.parameters())
    expected = {name: tuple(value.shape) for name, value in flat if name.startswith(prefixes)}
    weights = {n: w for n, w in weights.items() if n in expected or not _unused(module, n)}
    report(
        where,
        missing=expected.keys() - weights.keys(),
        unexpected=weights.keys() - expected.keys(),
        misshapen={
            n: (expected[n], tuple(w.shape))
            for n, w in weights.items()
            if expected.get(n, tuple(w.shape)) != tuple(w.shape)
        },
    )
    return weights


def _names(
    checkpoint: Checkpoint,
    rename: Callable[[str], str | None],
    prefixes: tuple[str, ...],
    where: str,
) -> dict[str, str]:
    """Parameter -> tensor, for those that matter here."""
    names: dict[str, str] = {}
    for key in checkpoint.tensors:
        ours = rename(key)
        if ours is None or not ours.startswith(prefixes):
            continue
        if ours in names:
            raise WeightsError(f"{where}: {names[ours]} and {key} are one tensor under two names.")
        names[ours] = key
    return names


def _sanitized(module: nn.Module, weights: dict[str, mx.array], part: str) -> dict[str, mx.array]:
    """Lets a language model's class (mlx-lm's) or a tower rename, join or drop what it knows of its
    own family."""
    owner = getattr(module, part, None)
    if owner is None or not hasattr(owner, "sanitize"):
        return weights
    prefix = f"{part}."
    mine = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    if not mine:
        return weights
    rest = {n: w for n, w in weights.items() if not n.startswith(prefix)}
    try:
        mine = owner.sanitize(mine)
    except (KeyError, ValueError, IndexError) as error:
        kind = getattr(owner, "model_type", None) or owner.config.model_type
        raise WeightsError(
            f"the {part} model's tensors are not those of a {kind!r}: "
            f"{error} is missing or misshapen."
        ) from None
    return {**rest, **{prefix + n: w for n, w in mine.items()}}


def _channels_last(name: str, weight: mx.array, writer: str) -> mx.array:
    """Patch embeddings as [D, P, P, C]; PyTorch has [D, C, P, P], MLX's own files are right."""
    if not name.endswith(PATCHES) or weight.ndim != 4:
        return weight
    _, a, b, c = weight.shape
    if a == b == c:  # a patch of 3 pixels: the shape cannot tell, the writer does
        return weight if writer == "mlx" else weight.transpose(0, 2, 3, 1)
    return weight.transpose(0, 2, 3, 1) if b == c else weight


def _quantize(
    module: nn.Module, weights: dict[str, mx.array], block: Mapping[str, Any] | None
) -> dict[str, mx.array]:
    """Quantises exactly the modules whose scales are among the weights."""
    paths = {n.removesuffix(".scales") for n in weights if n.endswith(".scales")}
    if not paths:
        return weights
    if block is None:
        raise ConfigError(
            "the checkpoint holds quantised tensors, but its config.json has no quantization block."
        )
    general = {k: block[k] for k in ("group_size", "bits", "mode") if k in block}

    def settings(path: str) -> dict[str, Any]:
        return {**general, **block.get(path, {})}

    def predicate(path: str, m: nn.Module) -> bool | dict[str, Any]:
        wanted = path in paths and not path.endswith(DENSE) and hasattr(m, "to_quantized")
        return settings(path) if wanted else False

    out = dict(weights)
    for path in sorted(paths):
        if path.endswith(DENSE):
            packed = (out.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases"))
            weight, scales, biases = packed
            if weight is not None and scales is not None:
                dense = mx.dequantize(weight, scales, biases, **settings(path))
                out[f"{path}.weight"] = dense
    try:
        nn.quantize(module, class_predicate=predicate)
    except ValueError as error:
        raise ConfigError(f"the quantization block of config.json does not fit: {error}.") from None
    return out


def _unused(module: nn.Module, name: str) -> bool:
    """Whether a vision or text tower knows the tensor as one that its config does without."""
    part, _, rest = name.partition(".")
    tower = getattr(module, part, None)
    unused = getattr(tower, "unused", None)
    return unused is not None and unused(rest)
