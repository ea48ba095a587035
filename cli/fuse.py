"""`mlxvlm fuse`: adapters into the weights."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxvlm.cli.parts import Language, Vision


def fuse(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Model that the adapters belong to, or LLaVA's or XTuner's export with adapters.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the fused model.")],
    adapter_path: Annotated[
        str | None,
        typer.Option(help="Folder that `mlxvlm lora` or PEFT wrote; an export holds its own."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Quantise the layers under adapters again, as they were: small, but part of what "
            "was learnt is rounded away.",
        ),
    ] = False,
    language: Language = None,
    vision: Vision = None,
) -> None:
    """Merge adapters into their model.

    A quantised layer under an adapter becomes an ordinary one, so that nothing learnt is lost, and
    the model grows; --requantize keeps it small.
    """
    from mlxvlm.weights.fuse import fuse

    done = fuse(
        model,
        out,
        adapter_path,
        requantise=requantize,
        language=language,
        vision=vision,
        report=lambda download: typer.echo(str(download), err=True),
    )
    size = f", {done.after / 1e9:.2f} GB" if done else ""
    typer.echo(f"Saved {out}{size}. Talk to it: mlxvlm chat -m {out}")
    if done and done.quantised and requantize:
        typer.echo(
            f"{done.quantised} layers under adapters were quantised again, as they were: part of "
            "what was learnt is rounded away. Without --requantize they stay whole."
        )
    elif done and done.quantised:
        typer.echo(
            f"{done.quantised} quantised layers under adapters are unquantised now, so that "
            f"nothing learnt is lost: {done.after / 1e9:.2f} GB instead of "
            f"{done.before / 1e9:.2f}. --requantize keeps them small, and rounds part of it away."
        )
