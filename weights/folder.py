"""What lies in a checkpoint's folder: config.json, and tensors in safetensors files.

Files are checked from their headers before anything is read. Pickles (.bin, .pt, .pth) are never
opened: loading one runs code that its author chose.
"""

from __future__ import annotations

import json
import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlxvlm.config import read_json
from mlxvlm.errors import WeightsError

if TYPE_CHECKING:
    from mlxvlm.weights.peft import LowRank

SINGLE = "model.safetensors"
ADAPTERS = "adapters.safetensors"
VISION_ADAPTERS = "vision_adapters.safetensors"
PROJECTOR = "projector.safetensors"
VISION = "vision.safetensors"
ALIGNER = "aligner.safetensors"
INDEX = "model.safetensors.index.json"
PEFT_ADAPTERS = "adapter_model.safetensors"
# What LLaVA's trainer leaves of a run that kept its language model as it was, beside adapters.
TRAINED = ("mm_projector.safetensors", "non_lora_trainables.safetensors")
# safetensors files that are no part of a model's own weights.
BESIDE = (ADAPTERS, VISION_ADAPTERS, PROJECTOR, VISION, ALIGNER, PEFT_ADAPTERS, *TRAINED)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Pickles that a trainer leaves beside a model: they hold no weights.
OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
MAX_HEADER = 100_000_000
Key = TypeVar("Key")

# In a line for a shell: torch reads tensors only (weights_only), whatever else a pickle asks for.
TO_SAFETENSORS = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "[save_file({k: v.contiguous().clone() for k, v in torch.load(f, map_location='cpu', "
    "weights_only=True).items()}, f.rsplit('.', 1)[0] + '.safetensors', {'format': 'pt'}) "
    'for f in sys.argv[1:]]" '
)


@dataclass
class Tensor:
    """A tensor as its file's header describes it, `name` its name there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Checkpoint:
    """A folder's config.json and the headers of its tensors; values are read by `read`.

    writer: the header's `format` entry, "mlx" or "pt", which tells how convolutions are laid out.
    tower, language: the folders of a vision tower and a language model that lie elsewhere; their
    tensors are among these. low_rank: what is added to tensors as they are read, by their names.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    writer: str = ""
    tower: Path | None = None
    language: Path | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        folder = Path(folder)
        checkpoint = cls(folder, read_json(folder / "config.json"))
        checkpoint.add(weight_files(folder))
        return checkpoint

    def add(self, files: Iterable[Path], prefix: str = "") -> None:
        """Takes in the tensors of files, under their names after `prefix`."""
        for file in files:
            tensors, metadata = read_header(file)
            self.tensors.update({prefix + name: tensor for name, tensor in tensors.items()})
            self.writer = metadata.get("format", self.writer)

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """The named tensors, not yet evaluated. Evaluate them before their files can change."""
        wanted = set(names)
        found = _arrays({name: self.tensors[name] for name in wanted}, self.folder)
        parts = {
            (name, part): tensor
            for name in wanted & self.low_rank.keys()
            for part, tensor in self.low_rank[name].tensors.items()
        }
        arrays = _arrays(parts, self.folder)
        for name in wanted & self.low_rank.keys():
            mine = {part: array for (owner, part), array in arrays.items() if owner == name}
            found[name] = self.low_rank[name].added_to(found[name], **mine)
        return found


def _arrays(tensors: Mapping[Key, Tensor], where: Path) -> dict[Key, mx.array]:
    """Lazy arrays of tensors, whatever they are called here."""
    found: dict[Key, mx.array] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        here = {key: tensor for key, tensor in tensors.items() if tensor.file == file}
        _check_dtypes(here.values(), where)
        try:
            arrays = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{file} cannot be read: {error}.") from None
        assert isinstance(arrays, dict)
        found.update((key, arrays[tensor.name]) for key, tensor in here.items())
    return found


def _check_dtypes(tensors: Iterable[Tensor], where: Path) -> None:
    bad = sorted((t.name, t.dtype) for t in tensors if t.dtype not in DTYPES)
    if bad:
        kinds = sorted({dtype for _, dtype in bad})
        raise WeightsError(
            f"{where}: tensors stored as {', '.join(kinds)} are not supported "
            f"({bad[0][0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}). "
            "Use a checkpoint in bfloat16, float16 or float32."
        )


class Outline(Checkpoint):
    """A checkpoint whose tensors are not here, only the headers of their files.

    `read` gives lazy zeros of the right shape and dtype: enough to know what a model takes.
    """

    @classmethod
    def of(cls, folder: Path, headers: dict[str, dict[str, Any]]) -> Outline:
        """headers: file -> its safetensors header."""
        outline = cls(folder, read_json(folder / "config.json"))
        for file, header in headers.items():
            outline.writer = (header.get("__metadata__") or {}).get("format", outline.writer)
            outline.tensors.update(
                (name, Tensor(folder / file, name, tuple(entry["shape"]), entry["dtype"]))
                for name, entry in header.items()
                if name != "__metadata__"
            )
        return outline

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        wanted = set(names)
        _check_dtypes([self.tensors[name] for name in wanted], self.folder)
        return {
            name: mx.zeros(self.tensors[name].shape, MLX_DTYPES[self.tensors[name].dtype])
            for name in wanted
        }


MLX_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U16": mx.uint16,
    "U8": mx.uint8,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "BOOL": mx.bool_,
}
DTYPES = frozenset(MLX_DTYPES)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model, or an error that says what is there instead."""
    if found := whole_files(folder):
        return found
    pickles = sorted(
        f.name
        for f in folder.iterdir()
        if f.suffix in PICKLES and not f.name.startswith(OF_TRAINING)
    )
    if pickles:
        raise only_pickles(folder, pickles)
    raise WeightsError(f"{folder} has no weights: no {SINGLE}, and no other .safetensors file.")


def whole_files(folder: Path) -> list[Path]:
    """The same; empty where there are none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = set(_weight_map(folder / INDEX).values())
        if strange := sorted(
            n for n in names if Path(n).name != n or not n.endswith(".safetensors")
        ):
            raise WeightsError(
                f"{folder / INDEX} names {strange[0]!r}, which is no file beside it."
            )
        if missing := sorted(n for n in names if not (folder / n).is_file()):
            raise WeightsError(
                f"{folder} lacks {', '.join(missing)}, which {INDEX} names. Download the rest."
            )
        return sorted(folder / name for name in names)
    found = sorted(f for f in folder.glob("*.safetensors") if f.name not in BESIDE)
    return [f for f in found if not f.name.startswith("consolidated")] or found


def only_pickles(folder: Path, names: list[str]) -> WeightsError:
    """The error for what is there as pickles alone, with the way out."""
    return WeightsError(
        f"{folder} has its weights only as pickles ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}), which can run code when opened and are never "
        f"loaded. {how_to_convert([folder / name for name in names])}"
    )


def how_to_convert(pickles: Iterable[str | Path]) -> str:
    """What writes the tensors of pickles into safetensors beside them, as a command to copy."""
    return (
        "Write them anew as .safetensors where torch and safetensors are installed (pip install "
        "torch safetensors), then come back:\n"
        + TO_SAFETENSORS
        + " ".join(shlex.quote(str(file)) for file in pickles)
    )


def _weight_map(path: Path) -> dict[str, str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise WeightsError(f"{path} has no usable weight_map.")
    return names


def read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and dtypes of a safetensors file, and its metadata; no tensor is read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise WeightsError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder."
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(MAX_HEADER, max(size - 8, 0)):
            raise WeightsError(
                f"{file} is truncated or no safetensors file ({size} bytes). Download it again."
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        tensors = {
            name: Tensor(file, name, tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise WeightsError(f"{file} has a damaged header. Download it again.") from None
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise WeightsError(
            f"{file} is truncated: it should have {needed} bytes and has {size}. Download it again."
        )
    return tensors, metadata
