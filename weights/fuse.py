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


@dataclass(frozen=True)
class Fused:
    """What merging did: quantised layers that had adapters, the weights' bytes before and after."""

    quantised: int
    before: int
    after: int


def fuse(
    model: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    *,
    requantise: bool = False,
    language: str | None = None,
    vision: str | None = None,
    report: Callable[[Download], Any] | None = None,
) -> Fused | None:
    """Writes a model with its adapters merged to the folder `out`; None where they were merged as
    they were read, into layers that are not quantised.

    adapter: a folder of `mlxvlm lora` or of PEFT; None for an export of LLaVA or XTuner, which has
    its own. requantise: as in `lora.fuse`. language, vision: as in `load`.
    """
    where = {"language": language, "vision": vision, "report": report}
    if adapter is not None:
        check_out(out, model, adapter)
        vlm = load(model, adapter=adapter, **where)
        own = [(name, tensor.nbytes) for name, tensor in tensors_of(vlm)]
        fused = None
        if any(is_adapter(name) for name, _ in own):  # PEFT's are merged as they are read
            quantised = lora.fuse(vlm, requantise)
            before = sum(size for name, size in own if not is_adapter(name))
            fused = Fused(quantised, before, sum(x.nbytes for _, x in tensors_of(vlm)))
        save(vlm, out)
        return fused
    check_out(out, model)
    folder = resolve(model, report=report)
    _, checkpoint, *_ = open_whole(folder, **where)
    if not checkpoint.low_rank:
        raise UsageError(
            f"{model} holds no adapters: name their folder with --adapter-path. (mlxvlm convert "
            "writes a model without any in mlxvlm's own layout.)"
        )
    convert(folder, out, **where)
    return None
