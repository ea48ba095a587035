"""`mlxvlm fuse`: adapters into the weights."""

from __future__ import annotations

from typing import Annotated

import typer


def fuse(
    model: Annotated[str, typer.Option("--model", "-m", help="Model that the adapters belong to.")],
    adapter_path: Annotated[str, typer.Option(help="Folder that `mlxvlm lora` wrote.")],
    out: Annotated[str, typer.Option(help="Folder for the fused model.")],
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Quantise the layers under adapters again, as they were: small, but part of what "
            "was learnt is rounded away.",
        ),
    ] = False,
) -> None:
    """Merge adapters into their model.

    A quantised layer under an adapter becomes an ordinary one, so that nothing learnt is lost, and
    the model grows; --requantize keeps it small.
    """
    from mlxvlm.config import is_adapter
    from mlxvlm.language import lora
    from mlxvlm.vision.encoder import tensors_of
    from mlxvlm.weights.join import check_out
    from mlxvlm.weights.load import load
    from mlxvlm.weights.save import save

    check_out(out, model, adapter_path)
    vlm = load(model, adapter=adapter_path)
    before = sum(x.nbytes for name, x in tensors_of(vlm) if not is_adapter(name))
    quantised = lora.fuse(vlm, requantise=requantize)
    after = sum(x.nbytes for _, x in tensors_of(vlm))
    save(vlm, out)
    typer.echo(f"Saved {out}, {after / 1e9:.2f} GB. Talk to it: mlxvlm chat -m {out}")
    if quantised and requantize:
        typer.echo(
            f"{quantised} layers under adapters were quantised again, as they were: part of what "
            "was learnt is rounded away. Without --requantize they stay whole."
        )
    elif quantised:
        typer.echo(
            f"{quantised} quantised layers under adapters are unquantised now, so that nothing "
            f"learnt is lost: {after / 1e9:.2f} GB instead of {before / 1e9:.2f}. --requantize "
            "keeps them small, and rounds part of it away."
        )
