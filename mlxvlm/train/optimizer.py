"""AdamW over flat parameter names, in groups with a learning rate and a decay of their own."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..errors import ConfigError
from .stages import TrainConfig


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


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with bias correction, as torch has it.

    Groups: projector, language model and vision tower, each with and without decay: vectors (norms,
    biases, DoRA's magnitudes) have none.
    """

    def __init__(self, config: TrainConfig, parameters: dict[str, mx.array]):
        if not parameters:
            raise ConfigError(f"--train (={config.train!r}) leaves nothing to train.")
        self.shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        peaks = {"projector": config.projector_learning_rate, "vision": config.vision_learning_rate}
        self.groups: list[tuple[float, optim.AdamW, list[str]]] = []
        for part in ("projector", "language", "vision"):
            for decayed in (True, False):
                names = [
                    name
                    for name, value in parameters.items()
                    if name.startswith(part + ".") and (value.ndim > 1) == decayed
                ]
                if names:
                    adamw = optim.AdamW(
                        learning_rate=0.0,
                        betas=[0.9, config.adam_beta2],
                        weight_decay=config.weight_decay if decayed else 0.0,
                        bias_correction=True,
                    )
                    adamw.init({name: parameters[name] for name in names})
                    self.groups.append((peaks.get(part) or config.learning_rate, adamw, names))

    def apply(
        self, gradients: dict[str, mx.array], parameters: dict[str, mx.array], share: float
    ) -> dict[str, mx.array]:
        """New values of all parameters, at `share` of each group's peak learning rate."""
        updated: dict[str, mx.array] = {}
        for peak, adamw, names in self.groups:
            adamw.learning_rate = peak * share
            updated.update(
                adamw.apply_gradients(
                    {name: gradients[name] for name in names},
                    {name: parameters[name] for name in names},
                )
            )
        return updated

    @property
    def state(self) -> list[dict[str, Any]]:
        return [adamw.state for _, adamw, _ in self.groups]

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
        for index, (_, adamw, _) in enumerate(self.groups):
            state: dict[str, Any] = {}
            for name, value in arrays.items():
                where, *path = name.split("|")
                if int(where) != index:
                    continue
                if len(path) == 1:
                    state[path[0]] = value
                else:
                    state.setdefault(path[0], {})[path[1]] = value
            adamw.state = state


def clip(gradients: dict[str, mx.array], limit: float) -> tuple[dict[str, mx.array], mx.array]:
    """Scales all gradients so that their global norm is at most `limit`; also the norm before."""
    norm = mx.sqrt(
        mx.stack([mx.square(g.astype(mx.float32)).sum() for g in gradients.values()]).sum()
    )
    if not limit:
        return gradients, norm
    scale = mx.minimum(1.0, limit / (norm + 1e-6))
    return {name: g * scale.astype(g.dtype) for name, g in gradients.items()}, norm
