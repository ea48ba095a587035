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
    language: Language = None,
    vision: Vision = None,
) -> None:
    """Merge adapters into their model; a quantised layer under an adapter becomes unquantised."""
    from mlxvlm.weights.fuse import fuse

    fuse(
        model,
        out,
        adapter_path,
        language=language,
        vision=vision,
        report=lambda download: typer.echo(str(download), err=True),
    )
    typer.echo(f"Saved {out}. Talk to it: mlxvlm chat -m {out}")
