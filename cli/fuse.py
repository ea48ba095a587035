"""`mlxvlm fuse`: adapters into the weights."""

from __future__ import annotations

from typing import Annotated

import typer


def fuse(
    model: Annotated[str, typer.Option("--model", "-m", help="Model that the adapters belong to.")],
    adapter_path: Annotated[str, typer.Option(help="Folder that `mlxvlm lora` wrote.")],
    out: Annotated[str, typer.Option(help="Folder for the fused model.")],
) -> None:
    """Merge adapters into their model; a quantised layer under an adapter becomes unquantised."""
    from mlxvlm.language import lora
    from mlxvlm.weights.join import check_out
    from mlxvlm.weights.load import load
    from mlxvlm.weights.save import save

    check_out(out, model, adapter_path)
    vlm = load(model, adapter=adapter_path)
    lora.fuse(vlm)
    save(vlm, out)
    typer.echo(f"Saved {out}. Talk to it: mlxvlm chat -m {out}")
