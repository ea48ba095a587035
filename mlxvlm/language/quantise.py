"""Which layers become quantised ones, and how: mlx's modes, mlx-lm's choices and its mixed recipes.

A weight's row is cut into groups that share a scale, so a group's size must divide the layer's
inputs. What every group leaves over stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from ..errors import ConfigError, UsageError

# Of each mode: its group sizes and bits, first of each what mlx-lm takes where none is given.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
# mlx-lm's: low bits, and more of them for the layers that need them most.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Quantisation:
    """What is wanted of layers: bits and group_size None are the mode's own.

    Where no group size is given, a layer that 64 does not divide takes 32. recipe: one of
    RECIPES, for a language model; it sets the bits of each layer itself.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"--q-mode (={self.mode}) must be one of {', '.join(MODES)}.")
        for flag, value, known in zip(
            ("--q-group-size", "--q-bits"),
            (self.group_size, self.bits),
            MODES[self.mode],
            strict=True,
        ):
            if value is not None and value not in known:
                one = f"one of {', '.join(map(str, sorted(known)))}"
                rule = str(known[0]) if len(known) == 1 else one
                raise UsageError(f"{flag} (={value}) must be {rule} for --q-mode {self.mode}.")
        if self.recipe is not None:
            if self.recipe not in RECIPES:
                raise UsageError(
                    f"--quant-predicate (={self.recipe}) must be one of {', '.join(RECIPES)}."
                )
            if self.mode != "affine":
                raise UsageError("--quant-predicate goes with --q-mode affine only.")
            if self.bits is not None:
                raise UsageError("--quant-predicate sets the bits itself: leave --q-bits out.")

    def settings(self, width: int, own: Settings | None = None) -> Settings | None:
        """What a layer of so many inputs gets, or None where no group fits.

        own: what the architecture or the recipe wants of this layer.
        """
        own = own or {"mode": self.mode}
        mode = own.get("mode", "affine")
        sizes, bits = MODES[mode]
        if self.group_size is not None and self.group_size in sizes:
            wanted: tuple[int, ...] = (self.group_size,)
        else:
            wanted = tuple(s for s in sizes if s <= own.get("group_size", sizes[0]))
        size = next((s for s in wanted if width % s == 0), None)
        if size is None:
            return None
        return {"group_size": size, "bits": own.get("bits") or self.bits or bits[0], "mode": mode}


@dataclass
class Choice:
    """settings: path -> what `to_quantized` gets. left: layers that no group fits, by path."""

    settings: dict[str, Settings] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def predicate(self, path: str, module: nn.Module) -> bool | Settings:
        """For `nn.quantize`."""
        return self.settings.get(path, False)


def choose(model: nn.Module, wanted: Quantisation, parts: Iterable[str] = ("language",)) -> Choice:
    """The linear layers and token embeddings of these parts of a model, as `wanted` has them.

    What the language model's architecture leaves out or keeps finer, it does here too. A group size
    that was asked for and does not divide a layer's inputs is a UsageError that names the layer,
    unless no other would.
    """
    choice = Choice()
    misfits: dict[str, int] = {}
    for part in parts:
        within = model[part]
        own = _own(within, wanted) if part == "language" else _linear
        for name, module in within.named_modules():
            if not hasattr(module, "to_quantized"):
                continue
            path, width = f"{part}.{name}", module.weight.shape[-1]
            asked = own(name, module)
            if not asked:
                continue
            settings = wanted.settings(width, asked if isinstance(asked, dict) else None)
            if settings is not None:
                choice.settings[path] = settings
            elif any(width % size == 0 for size in MODES[wanted.mode][0]):
                misfits[path] = width
            else:
                choice.left.append(path)
    if misfits:
        raise UsageError(_misfit(misfits, wanted))
    if not choice.settings:
        widths = sorted({module_width(model, path) for path in choice.left})
        raise ConfigError(
            f"--q-mode {wanted.mode} quantises groups of "
            f"{_either(sorted(MODES[wanted.mode][0]))} inputs, and no layer has whole ones "
            f"(they have {_either(widths)}): there is nothing to quantise."
        )
    return choice


def quantise(language: nn.Module, bits: int) -> None:
    """A language model's layers as `mlxvlm convert -q --q-bits` makes them, in place."""
    holder = nn.Module()
    holder["language"] = language
    choice = choose(holder, Quantisation(bits=bits))
    nn.quantize(holder, class_predicate=choice.predicate)


def module_width(model: nn.Module, path: str) -> int:
    """Inputs of the layer at `path`."""
    return dict(model.named_modules())[path].weight.shape[-1]


def _linear(path: str, module: nn.Module) -> bool:
    # A table of positions is added whole, never looked up.
    return not isinstance(module, nn.Embedding)


def _own(language: nn.Module, wanted: Quantisation) -> Callable[[str, Any], bool | Settings]:
    """What mlx-lm asks of a language model's layers: by the recipe, else by its architecture."""
    if wanted.recipe is None:
        return getattr(language, "quant_predicate", None) or (lambda path, module: True)
    from mlx_lm.convert import mixed_quant_predicate_builder

    size = wanted.group_size or MODES["affine"][0][0]
    try:
        recipe: Any = mixed_quant_predicate_builder(wanted.recipe, language, size)
    except ValueError as error:
        raise ConfigError(
            f"--quant-predicate {wanted.recipe} does not fit a language model of this "
            f"architecture ({str(error).rstrip('.')}): leave it out."
        ) from None
    return recipe


def _misfit(misfits: dict[str, int], wanted: Quantisation) -> str:
    path, width = min(misfits.items())
    more = f" (nor of {len(misfits)} layers in all)" if len(misfits) > 1 else ""
    sizes = MODES[wanted.mode][0]
    fits = [size for size in sorted(sizes) if not any(w % size for w in misfits.values())]
    way = f"use {_either(fits)}, or leave" if fits else "leave"
    return (
        f"--q-group-size (={wanted.group_size}) does not divide the {width} inputs of {path}"
        f"{more}: {way} it out, and each layer gets what fits it."
    )


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
