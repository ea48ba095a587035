"""`mlxvlm fuse`: a model and its adapters, as one model in our own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvlm.config import is_adapter
from mlxvlm.errors import UsageError
from mlxvlm.language import lora
from mlxvlm.vision.encoder import tensors_of
from mlxvlm.weights.convert import convert
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.join import check_out
from mlxvlm.weights.load import load, open_whole
from mlxvlm.weights.save import save


@dataclass
class Fused:
    """What `fuse` wrote. quantised: how many layers under adapters were so. before, after: bytes of
    the model's tensors without adapters, and of the fused one's."""

    quantised: int
    before: int
    after: int


def fuse(
    model: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    *,
    language: str | None = None,
    vision: str | None = None,
    requantise: bool = False,
    report: Callable[[Download], Any] | None = None,
) -> Fused:
    """Writes a model with its adapters merged to the folder `out`.

    adapter: a folder of `mlxvlm lora` or of PEFT; None for an export of LLaVA or XTuner, which has
    its own. language, vision: as in `load`. requantise: layers under adapters that were quantised
    become so again, which rounds away part of what was learnt; else they stay whole.
    """
    where = {"language": language, "vision": vision, "report": report}
    if adapter is not None:
        check_out(out, model, adapter)
        vlm = load(model, adapter=adapter, **where)
        tensors = tensors_of(vlm)
        before = sum(x.nbytes for name, x in tensors if not is_adapter(name))
        quantised = 0
        if any(is_adapter(name) for name, _ in tensors):  # PEFT's are merged as they are read
            quantised = lora.fuse(vlm, requantise)
        save(vlm, out)
        return Fused(quantised, before, sum(x.nbytes for _, x in tensors_of(vlm)))
    check_out(out, model)
    folder = resolve(model, report=report)
    _, checkpoint, *_ = open_whole(folder, **where)
    if not checkpoint.low_rank:
        raise UsageError(
            f"{model} holds no adapters: name their folder with --adapter-path. (mlxvlm convert "
            "writes a model without any in mlxvlm's own layout.)"
        )
    size = convert(folder, out, **where).bytes
    return Fused(0, size, size)
