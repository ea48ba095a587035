"""Adapters on a language model or a vision tower, in mlx-lm's layers.

    LoRA   y = W x + scale * B (A x)                         Hu et al. 2021
    DoRA   y = m / |W + scale * B A| * (W + scale * B A) x   Liu et al. 2024, the norm of each row

A is random, B zero and m the norms of W, so training starts at the base. rsLoRA (Kalajdzievski
2023) is LoRA with scale = alpha / sqrt(rank) instead of alpha / rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import LoRAConfig, is_adapter
from ..errors import ConfigError
from .forward import blocks_of

LINEAR = (nn.Linear, nn.QuantizedLinear)


def add_lora(lm: nn.Module, config: LoRAConfig) -> None:
    """Freezes the language model and puts adapters on layers of its blocks, in place.

    Fills `config.keys` in, so that what is saved says what was adapted.
    """
    layers = blocks_of(lm)
    if config.num_layers == 0 or config.num_layers < -1 or config.num_layers > len(layers):
        raise ConfigError(
            f"lora num_layers (={config.num_layers}) must be -1 (all) or 1 to {len(layers)}."
        )
    lm.freeze()
    blocks = layers if config.num_layers == -1 else layers[-config.num_layers :]
    _convert(lm, blocks, config.num_layers, config)


def add_vision_lora(vision: Any, config: LoRAConfig) -> None:
    """The same for a vision tower: on every block that its features come from."""
    vision.freeze()
    tower = nn.Module()
    tower.layers = vision.encoder.layers[: vision.config.num_layers_used]
    if not tower.layers:
        raise ConfigError(
            "this model's vision has no blocks to put adapters on: train it itself, as --train "
            "vision."
        )
    _convert(tower, tower.layers, -1, config)


def _convert(module: nn.Module, blocks: list[Any], num_layers: int, config: LoRAConfig) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    keys = linear_keys(blocks)
    if config.keys is not None:
        if unknown := [key for key in config.keys if not matching([key], blocks)]:
            raise ConfigError(
                f"lora keys {unknown} name no layer of a block; linear layers: {', '.join(keys)}."
            )
        keys = matching(config.keys, blocks)
    if config.dora:
        _check_dora(blocks, keys)
    parameters = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    linear_to_lora_layers(module, num_layers, {**parameters, "keys": keys}, use_dora=config.dora)
    config.keys = keys


def linear_keys(blocks: Sequence[nn.Module]) -> list[str]:
    """Names, within a block, of all linear layers; blocks may differ."""
    return sorted({name for b in blocks for name, m in b.named_modules() if isinstance(m, LINEAR)})


def matching(keys: Sequence[str], blocks: Sequence[nn.Module]) -> list[str]:
    """Names, within a block, of the layers that `keys` name whole or by their ends."""
    known = {
        name: m for b in blocks for name, m in b.named_modules() if name and hasattr(m, "weight")
    }
    ends = tuple("." + key for key in keys)
    return sorted(name for name in known if ("." + name).endswith(ends))


def _check_dora(blocks: Sequence[nn.Module], keys: list[str]) -> None:
    for block in blocks:
        for name, m in block.named_modules():
            if name in keys and not isinstance(m, LINEAR):
                raise ConfigError(
                    f"DoRA cannot adapt {name}, a {type(m).__name__}: leave it out of --lora-keys, "
                    "or use plain LoRA."
                )
            # mlx-lm takes 32 // bits for the width.
            if name in keys and isinstance(m, nn.QuantizedLinear) and 32 % m.bits:
                raise ConfigError(
                    f"DoRA cannot adapt {name}, which is quantised to {m.bits} bits: it takes 2, 4 "
                    "and 8. Use plain LoRA, or another base."
                )


def adapter_parameters(module: nn.Module) -> dict[str, mx.array]:
    """The adapters' own arrays, by mlx-lm's names."""
    leaves: Any = tree_flatten(module.parameters())
    return {name: v for name, v in leaves if is_adapter(name)}


def fuse(module: nn.Module, requantise: bool = False) -> int:
    """Merges all adapters into their layers, in place, summed in float32 and rounded once; how many
    of these were quantised.

    A quantised layer becomes an ordinary one: quantising the sum again loses part of what was
    learnt. requantise: do so all the same, as the layer was.
    """
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    merged = [
        (name, m.linear, _merge(m))
        for name, m in module.named_modules()
        if isinstance(m, LoRALinear | DoRALinear)
    ]
    if not merged:
        raise ConfigError("there is no adapter to fuse: give --adapter-path.")
    layers: list[tuple[str, nn.Module]] = []
    quantised = 0
    for name, before, after in merged:
        if isinstance(before, nn.QuantizedLinear):
            quantised += 1
            if requantise:
                after = nn.QuantizedLinear.from_linear(
                    after, before.group_size, before.bits, before.mode
                )
        layers.append((name, after))
    module.update_modules(tree_unflatten(layers))
    mx.eval(module.parameters())
    return quantised


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
    delta = module.scale * (module.lora_a.astype(mx.float32) @ module.lora_b.astype(mx.float32)).T
    total = weight.astype(mx.float32) + delta
    if "m" in module:
        norms = mx.sqrt(mx.square(total).sum(axis=1))
        total = (module.m.astype(mx.float32) / norms)[:, None] * total
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    merged.weight = total.astype(dtype)
    if "bias" in linear:
        merged.bias = linear.bias
    return merged
