"""Low-rank adapters on the language model, in mlx-lm's layers.

y = W x + scale * B (A x)          Hu et al. 2021; A random, B zero, so training starts at the base
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import LoRAConfig
from ..errors import ConfigError
from .forward import blocks_of


def add_lora(lm: nn.Module, config: LoRAConfig) -> None:
    """Freezes the language model and puts adapters on its linear layers, in place.

    Fills `config.keys` in, so that what is saved says what was adapted.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = blocks_of(lm)
    if config.num_layers == 0 or config.num_layers < -1 or config.num_layers > len(layers):
        raise ConfigError(
            f"lora num_layers (={config.num_layers}) must be -1 (all) or 1 to {len(layers)}."
        )
    keys = config.keys or linear_keys(lm)
    known = {name for name, _ in layers[-1].named_modules()}
    if unknown := [key for key in keys if key not in known]:
        raise ConfigError(
            f"lora keys {unknown} name no layer of a block; linear layers: "
            f"{', '.join(linear_keys(lm))}."
        )
    lm.freeze()
    parameters = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    linear_to_lora_layers(lm, config.num_layers, {**parameters, "keys": keys})
    config.keys = keys


def linear_keys(lm: nn.Module) -> list[str]:
    """Names, within a block, of all its linear layers."""
    linear = (nn.Linear, nn.QuantizedLinear)
    return sorted(name for name, m in blocks_of(lm)[-1].named_modules() if isinstance(m, linear))


def adapter_parameters(lm: nn.Module) -> dict[str, mx.array]:
    """The adapters' own arrays, by mlx-lm's names."""
    leaves: Any = tree_flatten(lm.parameters())
    return {name: v for name, v in leaves if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def fuse(lm: nn.Module) -> None:
    """Merges the adapters into their layers, in place: W + scale * (A B)ᵀ, rounded once.

    A quantised layer becomes an ordinary one: quantising the sum again would lose part of what was
    learnt.
    """
    from mlx_lm.tuner.lora import LoRALinear

    merged = [
        (name, _merge(module))
        for name, module in lm.named_modules()
        if isinstance(module, LoRALinear)
    ]
    if not merged:
        raise ConfigError("there is no adapter to fuse: give --adapter-path.")
    lm.update_modules(tree_unflatten(merged))
    mx.eval(lm.parameters())


def _merge(module: Any) -> nn.Linear:
    # mlx-lm's own fuse sums in the stored dtype, which rounds a bfloat16 layer three times.
    linear = module.linear
    weight, dtype = linear.weight, linear.weight.dtype
    if isinstance(linear, nn.QuantizedLinear):
        scales, biases = linear.scales, linear.biases
        # The floating modes have scales of a few bits and no dtype of their own to go back to.
        dtype = mx.float32
        if biases is not None:
            dtype = scales.dtype
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(
            weight,
            scales,
            biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    delta = module.scale * (module.lora_a @ module.lora_b).T
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    merged.weight = (weight.astype(mx.float32) + delta.astype(mx.float32)).astype(dtype)
    if "bias" in linear:
        merged.bias = linear.bias
    return merged
