"""A run's checkpoints: one folder a step, written beside and renamed, so it is whole or absent.

    checkpoints/step-000500/weights.safetensors     the parts that train
                            optimizer.safetensors   the optimizer's state
                            state.json              step, progress, fingerprint of the run
    checkpoints/best-000400/weights.safetensors     of the best validation so far

Data order and randomness are functions of seed and step, so beside weights and optimizer there is
little to save: `progress` holds what earlier steps decide about later ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..amount import amount
from ..config import read_json
from ..durable import is_full, sync_path
from ..errors import ConfigError, VLMError
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
    progress: dict[str, Any] | None = None,
) -> Path:
    """Writes one checkpoint durably, then prunes the oldest beyond `keep`.

    progress: JSON values that `load` gives back.
    """
    final = out / FOLDER / f"step-{step:06d}"
    with _beside(final) as beside:
        mx.save_safetensors(str(beside / "weights.safetensors"), weights)
        mx.save_safetensors(str(beside / "optimizer.safetensors"), optimizer.to_arrays())
        state = {"step": step, "progress": progress or {}, "run": fingerprint}
        (beside / "state.json").write_text(json.dumps(state, indent=1))
    for old in steps(out)[:-keep] if keep else []:
        shutil.rmtree(out / FOLDER / f"step-{old:06d}")
    return final


def save_best(out: Path, step: int, weights: dict[str, mx.array]) -> Path:
    """Keeps the weights of the best validation so far; `prune_best` removes earlier ones."""
    final = out / FOLDER / f"best-{step:06d}"
    with _beside(final) as beside:
        mx.save_safetensors(str(beside / "weights.safetensors"), weights)
    return final


def load_best(out: Path, step: int) -> dict[str, mx.array]:
    weights = mx.load(str(out / FOLDER / f"best-{step:06d}" / "weights.safetensors"))
    assert isinstance(weights, dict)
    return weights


def prune_best(out: Path, kept: set[int]) -> None:
    """Removes the weights of earlier bests. What the last checkpoint calls the best stays until
    the next one: a run that is killed goes on from there."""
    if found := steps(out):
        state = read_json(out / FOLDER / f"step-{found[-1]:06d}" / "state.json")
        kept = kept | {state["progress"].get("best", {}).get("step", 0)}
    for path in (out / FOLDER).glob("best-*"):
        if int(path.name[5:]) not in kept:
            shutil.rmtree(path)


def steps(out: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.name[5:]) for path in (out / FOLDER).glob("step-*"))


# Entries of a fingerprint that other entries, or the data, decide.
DERIVED = ("rows", "steps")
DIGESTS = ("rows", "model's tensors")


def load(
    out: Path, optimizer: Optimizer, fingerprint: dict[str, Any]
) -> tuple[int, dict[str, mx.array], dict[str, Any]]:
    """Restores the optimizer from the last checkpoint; its step, weights and progress."""
    found = steps(out)
    if not found:
        raise ConfigError(f"{out} has no checkpoint to resume from; start without --resume.")
    folder = out / FOLDER / f"step-{found[-1]:06d}"
    state = read_json(folder / "state.json")
    before, now = state["run"], json.loads(json.dumps(fingerprint))
    if changed := sorted(k for k in before | now if before.get(k) != now.get(k)):
        # What follows from others is told only where no other differs.
        told = [k for k in changed if k not in DERIVED] or changed
        values = "; ".join(
            f"its {k} differ" if k in DIGESTS else f"{k} was {before.get(k)!r}, now {now.get(k)!r}"
            for k in told
        )
        raise ConfigError(
            f"--resume must go on with the same run, but {values}. Use the old values or another "
            "--out."
        )
    weights = mx.load(str(folder / "weights.safetensors"))
    arrays = mx.load(str(folder / "optimizer.safetensors"))
    assert isinstance(weights, dict) and isinstance(arrays, dict)
    check(optimizer.shapes, weights, str(folder))
    optimizer.from_arrays(arrays)
    mx.eval(weights, optimizer.state)
    return state["step"], weights, state["progress"]


@contextmanager
def until_full(out: Path) -> Iterator[None]:
    """Says, of a disk that runs full in the block, what of the run is safe."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # MLX's writer gives no error number, only these words.
        wrote = isinstance(error, RuntimeError) and "Unable to write" in str(error)
        if not wrote and not (isinstance(error, OSError) and is_full(error)):
            raise
        found = steps(out)
        kept = (
            f"The checkpoint of step {found[-1]:,} is whole: make room, and --resume goes on "
            "from there."
            if found
            else "There is no checkpoint yet: make room, and start again."
        )
        free = amount(shutil.disk_usage(out).free)
        raise VLMError(
            f"the run stopped because nothing more could be written to {out} ({free} free). {kept}"
        ) from error


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """A folder to fill, which then takes its name durably, or goes without a trace."""
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in (*beside.iterdir(), beside):
            sync_path(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    sync_path(final.parent)
