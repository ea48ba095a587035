"""Checkpoints out: our own layout, written beside and renamed into place.

config.json                     the five choices
model.safetensors               or model-00001-of-0000N.safetensors and an index, past 5 GB
tokenizer.json, ...             the files that the tokenizer came from
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvlm.amount import amount
from mlxvlm.config import is_adapter
from mlxvlm.durable import sync_path
from mlxvlm.errors import WeightsError
from mlxvlm.weights.folder import INDEX, SINGLE

if TYPE_CHECKING:
    from mlxvlm.model import VLM

SHARD_BYTES = 5 * 10**9


def save(vlm: VLM, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model so that `load` gives it back bit for bit.

    The folder may be the one that the model came from: new files are complete before they replace
    old ones, and what else lies there stays.
    """
    folder = Path(folder)
    weights = dict(tree_flatten(vlm.parameters()))
    adapters = [name for name in weights if is_adapter(name)]
    if adapters:
        raise WeightsError(
            f"the model has {len(adapters)} adapter tensors ({adapters[0]}, ...): fuse them first, "
            "or save the adapter alone."
        )
    mx.eval(list(weights.values()))  # what is still to be read from a file must be, before it goes
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, sum(w.nbytes for w in weights.values()))
    config = dataclasses.replace(vlm.config, quantization=quantization_of(vlm))
    with room_beside(folder) as beside:
        write_tensors(weights, beside, shard_bytes)
        if vlm.tokenizer is not None:
            _save_tokenizer(vlm.tokenizer, beside)
        config.save(beside / "config.json")
        put_in_place(beside, folder)


def quantization_of(module: nn.Module) -> dict[str, Any] | None:
    """mlx-lm's `quantization` block for a module's quantised layers; None where it has none."""
    layers = {
        name: {"group_size": m.group_size, "bits": m.bits, "mode": getattr(m, "mode", "affine")}
        for name, m in module.named_modules()
        if "scales" in m and hasattr(m, "bits")
    }
    if not layers:
        return None
    counts = Counter(json.dumps(settings, sort_keys=True) for settings in layers.values())
    general = json.loads(counts.most_common(1)[0][0])
    return {**general, **{name: s for name, s in layers.items() if s != general}}


def write_tensors(
    weights: dict[str, mx.array], folder: Path, shard_bytes: int = SHARD_BYTES, writer: str = "mlx"
) -> None:
    """model.safetensors, or shards of at most so many bytes and their index.

    writer: "mlx" or "pt", whose way convolutions are laid out.
    """
    shards: list[dict[str, mx.array]] = [{}]
    used = 0
    for name in sorted(weights):
        count = weights[name].nbytes
        if used and used + count > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = weights[name]
        used += count
    metadata = {"format": writer}
    if len(shards) == 1:
        mx.save_safetensors(str(folder / SINGLE), shards[0], metadata)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / name), shard, metadata)
        places.update(dict.fromkeys(shard, name))
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save(folder)
    # A template that the tokenizer's own files do not hold came with a processor.
    kept = (folder / "chat_template.jinja").exists()
    settings = folder / "tokenizer_config.json"
    kept = kept or (
        settings.exists() and "chat_template" in json.loads(settings.read_text("utf-8"))
    )
    if tokenizer.chat_template and not kept:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def put_in_place(beside: Path, folder: Path) -> None:
    """The files of a new model, complete in `beside`, to their names."""
    names = sorted(file.name for file in beside.iterdir())
    for name in names:
        sync_path(beside / name)
    # config.json goes last: where it is new, all that it speaks of is there.
    names.remove("config.json")
    for name in names:
        os.replace(beside / name, folder / name)
    _remove_stale(folder, set(names))
    os.replace(beside / "config.json", folder / "config.json")
    sync_path(folder)


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Weights of an earlier model in the same folder, which a loader could take for this one's."""
    old = [*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")]
    for file in old:
        if file.name not in written:
            file.unlink()


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"saving needs {amount(needed)}, but only {amount(free)} are free on the disk of "
            f"{folder}."
        )


@contextmanager
def room_beside(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for new files, gone afterwards, and with it any that a kill left."""
    for left in folder.glob(".saving-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        yield Path(beside)
