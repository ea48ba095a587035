"""`mlxvlm export`: a model for other libraries."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def export(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub id.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the exported model.")],
    to: Annotated[
        Literal["transformers", "minicpm"],
        typer.Option(
            help="For whom: transformers gets a LlavaForConditionalGeneration, minicpm the layout "
            "of MiniCPM-Llama3-V 2.5."
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What tensors become. Default: as stored."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
) -> None:
    """Write a model for transformers, with tokenizer, processor and chat template.

    It must be what LLaVA is: SigLIP or CLIP without its final norm, one view a picture, projector
    mlp, and a llama, mistral, qwen2 or qwen3 that is not quantised. Or, for minicpm, what
    MiniCPM-Llama3-V 2.5 is. Anything else is refused, and why. mlxvlm loads the folder too.
    """
    from mlxvlm.weights.export import export
    from mlxvlm.weights.export_minicpm import export_minicpm

    write = export if to == "transformers" else export_minicpm
    write(
        model,
        out,
        dtype=dtype,
        revision=revision,
        report=lambda download: typer.echo(str(download), err=True),
    )
    if to == "minicpm":
        typer.echo(f"Saved {out}, in MiniCPM-Llama3-V 2.5's layout, without its authors' code.")
        return
    typer.echo(
        f"Saved {out}. In Python: LlavaForConditionalGeneration.from_pretrained({out!r}) and "
        f"AutoProcessor.from_pretrained({out!r}), both of transformers."
    )
