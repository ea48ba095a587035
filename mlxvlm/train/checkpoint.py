"""A run's checkpoints: one folder a step, written beside and renamed, so it is whole or absent.

    checkpoints/step-000500/weights.safetensors     the parts that train
                            optimizer.safetensors   AdamW's state
                            state.json              step, fingerprint of the run

Data order and randomness are functions of seed and step, so the step is all there is to save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import read_json
from ..durable import sync_path
from ..errors import ConfigError
from ..weights.check import check
from .optimizer import Optimizer

FOLDER = "checkpoints"


def save(
    out: Path,
    step: int,
    weights: dict[str, mx.array],
    optimizer: Optimizer,
    fingerprint: dict[str, Any],
    keep: int,
) -> Path:
    """Writes one checkpoint durably, then prunes the oldest beyond `keep`."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    beside = folder / f".{final.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    mx.save_safetensors(str(beside / "weights.safetensors"), weights)
    mx.save_safetensors(str(beside / "optimizer.safetensors"), optimizer.to_arrays())
    (beside / "state.json").write_text(json.dumps({"step": step, "run": fingerprint}, indent=1))
    for path in (*beside.iterdir(), beside):
        sync_path(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    sync_path(folder)
    for old in steps(out)[:-keep] if keep else []:
        shutil.rmtree(folder / f"step-{old:06d}")
    return final


def steps(out: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.name[5:]) for path in (out / FOLDER).glob("step-*"))


def load(
    out: Path, optimizer: Optimizer, fingerprint: dict[str, Any]
) -> tuple[int, dict[str, mx.array]]:
    """Restores the optimizer from the last checkpoint; its step and weights."""
    found = steps(out)
    if not found:
        raise ConfigError(f"{out} has no checkpoint to resume from; start without --resume.")
    folder = out / FOLDER / f"step-{found[-1]:06d}"
    state = read_json(folder / "state.json")
    before, now = state["run"], json.loads(json.dumps(fingerprint))
    if changed := sorted(k for k in before | now if before.get(k) != now.get(k)):
        name = changed[0]
        raise ConfigError(
            f"--resume must go on with the same run, but {', '.join(changed)} differ: {name} was "
            f"{before.get(name)!r}, now {now.get(name)!r}. Use the old values or another --out."
        )
    weights = mx.load(str(folder / "weights.safetensors"))
    arrays = mx.load(str(folder / "optimizer.safetensors"))
    assert isinstance(weights, dict) and isinstance(arrays, dict)
    check(optimizer.shapes, weights, str(folder))
    optimizer.from_arrays(arrays)
    mx.eval(weights, optimizer.state)
    return state["step"], weights
