"""`mlxvlm convert`: a model in any layout that `load` reads, to our own, and quantised on the way.

Where nothing is quantised or cast, the result gives the same logits bit for bit.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.errors import ConfigError
from mlxvlm.language.quantise import Choice, Quantisation, choose
from mlxvlm.weights.check import grouped
from mlxvlm.weights.folder import ADAPTERS, VISION_ADAPTERS
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.join import check_out
from mlxvlm.weights.load import open_whole
from mlxvlm.weights.save import SHARD_BYTES, save
from mlxvlm.weights.tensors import fill, parse_dtype

# What belongs to a model's folder beside the weights, config.json and the tokenizer's own files.
KEPT = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass
class Converted:
    """What `convert` wrote.

    bytes: of the tensors. bits_per_weight: over all of the model's weights. layers: how many are
    quantised in which way. left: layers that no group fits, their numbers drawn together.
    """

    bytes: int
    bits_per_weight: float
    layers: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    quantisation: Quantisation | None = None,
    parts: Sequence[str] = ("language",),
    revision: str | None = None,
    language: str | None = None,
    vision: str | None = None,
    resize: str = "",
    report: Callable[[Download], Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Writes the model of a folder or a hub id to the folder `out`, in our own layout.

    dtype: what floating tensors become, before any is quantised; by default as stored.
    quantisation: how the layers of `parts` (language, projector, vision) are quantised; None: not.
    language, vision, resize: as in `load`.
    Memory holds what is written and the tensor at hand, so a model may be larger than it.
    """
    from mlxvlm.model import VLM

    wanted = parse_dtype(dtype)
    out = check_out(out, source)
    folder = resolve(source, revision, report)
    refuse_adapters(folder)
    family, checkpoint, config, tokenizer = open_whole(
        folder, report=report, language=language, vision=vision
    )
    config.override(resize)
    if quantisation is not None and (block := config.quantization) is not None:
        raise ConfigError(
            f"{folder} is quantised already ({block['bits']} bits, groups of "
            f"{block['group_size']}): doing it again would add error to error. Give -m the model "
            "that it was made from, or leave -q out to convert it as it is."
        )
    vlm = VLM(config, tokenizer)
    count = sum(math.prod(value.shape) for _, value in _tensors(vlm))
    choice = choose(vlm, quantisation, parts) if quantisation else Choice()
    fill(
        vlm,
        checkpoint,
        family.rename,
        dtype=wanted,
        quantization=config.quantization,
        quantise=choice.settings,
    )
    out.mkdir(parents=True, exist_ok=True)
    keep_files(folder, out, (*KEPT, *LICENCES))
    save(vlm, out, shard_bytes)
    size = sum(value.nbytes for _, value in _tensors(vlm))
    layers = Counter(
        f"{s['bits']} bits ({s['mode']}, groups of {s['group_size']})"
        for s in choice.settings.values()
    )
    return Converted(size, 8 * size / count, layers, grouped(choice.left))


def refuse_adapters(folder: Path) -> None:
    """A folder with adapters in it stands for more than the model that its other files hold."""
    for name in (ADAPTERS, VISION_ADAPTERS):
        if (folder / name).is_file():
            raise ConfigError(
                f"{folder} holds adapters ({name}): merge them into their model first, with "
                f"mlxvlm fuse -m MODEL --adapter-path {folder} --out DIR, and give that folder."
            )


def keep_files(folder: Path, out: Path, patterns: Sequence[str]) -> None:
    """Copies what else belongs to a model."""
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def _tensors(vlm: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(vlm.parameters())
    return flat
