"""Optimizers by name over flat parameter names, in groups with a rate and a decay of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..errors import ConfigError
from .stages import TrainConfig

# Tables and heads, which Muon leaves to AdamW: their rows are words, not directions.
TABLES = ("embed", "wte", "lm_head", "output.weight", "position", "projector.query")


class Muon(optim.Muon):
    """Muon (Jordan et al. 2024) with steps as large as AdamW's, so that one learning rate serves
    both: 0.2 sqrt(max(rows, columns)) times the orthogonal matrix (Liu et al. 2025)."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rows, columns = parameter.shape
        theirs = math.sqrt(max(1, rows / columns))
        step = super().apply_single(gradient, mx.zeros_like(parameter), state)
        return parameter + step * (0.2 * math.sqrt(max(rows, columns)) / theirs)


def _adam(config: TrainConfig) -> optim.Optimizer:
    return optim.Adam(0.0, betas=[0.9, config.adam_beta2], bias_correction=True)


# Decay is ours, the same for all of them; each has its paper's other settings.
RULES: dict[str, Callable[[TrainConfig], optim.Optimizer]] = {
    "adamw": _adam,
    "adam": _adam,
    # As transformers runs it where a learning rate is given.
    "adafactor": lambda config: optim.Adafactor(0.0, scale_parameter=False, relative_step=False),
    "sgd": lambda config: optim.SGD(0.0, momentum=0.9),
    "lion": lambda config: optim.Lion(0.0),
    "muon": lambda config: Muon(0.0, weight_decay=0.0),
    "adamax": lambda config: optim.Adamax(0.0),
    "rmsprop": lambda config: optim.RMSprop(0.0),
    "adagrad": lambda config: optim.Adagrad(0.0),
}


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the peak rate at `step` (from 0) of `steps`: warm-up, hold, then the schedule."""
    warmup = config.warmup * steps if config.warmup < 1 else config.warmup
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, config.hold * steps)
    if config.schedule == "constant" or step < start:
        return 1.0
    done = (step - start) / max(1.0, steps - start)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_learning_rate + (1 - config.min_learning_rate) * fall


@dataclass
class Group:
    """Parameters with one peak learning rate, one decay and one rule."""

    peak: float
    decay: float
    rule: optim.Optimizer
    names: list[str]


class Optimizer:
    """The optimizer that `--optimizer` names; AdamW (Loshchilov & Hutter 2019) as torch has it.

    Groups: projector, language model, vision tower and aligner, each with and without decay:
    vectors (norms, biases, DoRA's magnitudes) have none. Decay is AdamW's, w (1 - rate * decay)
    before the step, under every rule. Muon takes matrices; tables, heads and the rest have AdamW
    under it.
    """

    def __init__(self, config: TrainConfig, parameters: dict[str, mx.array]):
        if not parameters:
            raise ConfigError(f"--train (={config.train!r}) leaves nothing to train.")
        self.shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        peaks = {"projector": config.projector_learning_rate, "vision": config.vision_learning_rate}
        kinds: dict[tuple[str, bool, str], list[str]] = {}
        for part in ("projector", "language", "vision", "aligner"):
            for decayed in (True, False):
                for name, value in parameters.items():
                    if name.startswith(part + ".") and (value.ndim > 1) == decayed:
                        rule = _rule_for(config.optimizer, name, value)
                        kinds.setdefault((part, decayed, rule), []).append(name)
        self.groups: list[Group] = []
        for (part, decayed, rule), names in kinds.items():
            optimizer = RULES[rule](config)
            optimizer.init({name: parameters[name] for name in names})
            peak = peaks.get(part) or config.learning_rate
            self.groups.append(
                Group(peak, config.weight_decay if decayed else 0.0, optimizer, names)
            )

    def apply(
        self, gradients: dict[str, mx.array], parameters: dict[str, mx.array], share: float
    ) -> dict[str, mx.array]:
        """New values of all parameters, at `share` of each group's peak learning rate."""
        updated: dict[str, mx.array] = {}
        for group in self.groups:
            rate = group.peak * share
            group.rule.learning_rate = rate
            kept = 1 - rate * group.decay
            before = {name: parameters[name] for name in group.names}
            if group.decay:
                before = {name: value * kept for name, value in before.items()}
            updated.update(
                group.rule.apply_gradients({name: gradients[name] for name in group.names}, before)
            )
        return updated

    @property
    def state(self) -> list[dict[str, Any]]:
        return [group.rule.state for group in self.groups]

    def to_arrays(self) -> dict[str, mx.array]:
        """Its whole state under flat names, for a checkpoint."""
        arrays: dict[str, mx.array] = {}
        for index, state in enumerate(self.state):
            for key, value in state.items():
                if isinstance(value, dict):
                    arrays.update({f"{index}|{key}|{leaf}": v for leaf, v in value.items()})
                else:
                    arrays[f"{index}|{key}"] = value
        return arrays

    def from_arrays(self, arrays: dict[str, mx.array]) -> None:
        for index, group in enumerate(self.groups):
            state: dict[str, Any] = {}
            for name, value in arrays.items():
                where, *path = name.split("|")
                if int(where) != index:
                    continue
                if len(path) == 1:
                    state[path[0]] = value
                else:
                    state.setdefault(path[0], {})[path[1]] = value
            group.rule.state = state


def _rule_for(name: str, parameter: str, value: mx.array) -> str:
    if name != "muon":
        return name
    table = any(word in parameter for word in TABLES)
    return "muon" if value.ndim == 2 and not table else "adamw"


def clip(gradients: dict[str, mx.array], limit: float) -> tuple[dict[str, mx.array], mx.array]:
    """Scales all gradients so that their global norm is at most `limit`; also the norm before."""
    norm = mx.sqrt(
        mx.stack([mx.square(g.astype(mx.float32)).sum() for g in gradients.values()]).sum()
    )
    if not limit:
        return gradients, norm
    scale = mx.minimum(1.0, limit / (norm + 1e-6))
    return {name: g * scale.astype(g.dtype) for name, g in gradients.items()}, norm
