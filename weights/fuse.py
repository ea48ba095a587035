"""`mlxvlm fuse`: a model and its adapters, as one model in our own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlxvlm.config import is_adapter
from mlxvlm.errors import UsageError
from mlxvlm.language import lora
from mlxvlm.weights.convert import convert
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.join import check_out
from mlxvlm.weights.load import load, open_whole
from mlxvlm.weights.save import save


def fuse(
    model: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    *,
    language: str | None = None,
    vision: str | None = None,
    report: Callable[[Download], Any] | None = None,
) -> None:
    """Writes a model with its adapters merged to the folder `out`.

    adapter: a folder of `mlxvlm lora` or of PEFT; None for an export of LLaVA or XTuner, which has
    its own. language, vision: as in `load`.
    """
    where = {"language": language, "vision": vision, "report": report}
    if adapter is not None:
        check_out(out, model, adapter)
        vlm = load(model, adapter=adapter, **where)
        names: Any = tree_flatten(vlm.parameters())
        if any(is_adapter(name) for name, _ in names):  # PEFT's are merged as they are read
            lora.fuse(vlm)
        save(vlm, out)
        return
    check_out(out, model)
    folder = resolve(model, report=report)
    _, checkpoint, *_ = open_whole(folder, **where)
    if not checkpoint.low_rank:
        raise UsageError(
            f"{model} holds no adapters: name their folder with --adapter-path. (mlxvlm convert "
            "writes a model without any in mlxvlm's own layout.)"
        )
    convert(folder, out, **where)
