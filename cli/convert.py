"""`mlxvlm convert`: a model to our own layout, quantised if asked."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mlxvlm.cli.parts import Language, Resize, Vision
from mlxvlm.errors import UsageError

PARTS = ("language", "projector", "vision")


def convert(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub id.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the converted model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="What unquantised tensors become; a vision tower that would be float16 is "
            "float32. Default: as stored."
        ),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantise the language model.")
    ] = False,
    q_bits: Annotated[
        int | None,
        typer.Option(help="Bits a weight: 2, 3, 4, 5, 6 or 8. [4; 8 for mxfp8]"),
    ] = None,
    q_group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, 64 or 128. [64, or 32 where 64 does not fit; 32 "
            "for mxfp4 and mxfp8, 16 for nvfp4]"
        ),
    ] = None,
    q_mode: Annotated[
        Literal["affine", "mxfp4", "mxfp8", "nvfp4"] | None,
        typer.Option(help="How weights are stored. Default: affine.", show_default=False),
    ] = None,
    quant_predicate: Annotated[
        Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"] | None,
        typer.Option(help="mlx-lm's mixed recipes: low bits, and more where they count."),
    ] = None,
    q_parts: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="What -q quantises: language, projector, vision, with commas. Default: language.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    language: Language = None,
    vision: Vision = None,
    resize: Resize = None,
) -> None:
    """Write a model in mlxvlm's own layout, and quantise it with -q.

    Reads every layout that chat does: LLaVA's, XTuner's, transformers', mlx-community's, our own;
    of LLaVA's and XTuner's exports the adapters are merged. Without -q and --dtype nothing is lost:
    logits stay the same bit for bit. Tower and projector stay as they are unless --q-parts names
    them.
    """
    given = {
        "--q-bits": q_bits,
        "--q-group-size": q_group_size,
        "--q-mode": q_mode,
        "--quant-predicate": quant_predicate,
        "--q-parts": q_parts,
    }
    idle = [flag for flag, value in given.items() if value is not None]
    if idle and not quantize:
        raise UsageError(f"{idle[0]} says how to quantise: add -q, or leave it out.")
    parts = [part.strip() for part in (q_parts or "language").split(",")]
    if strange := [part for part in parts if part not in PARTS]:
        raise UsageError(f"--q-parts (={q_parts}) may name {', '.join(PARTS)}, not {strange[0]!r}.")

    from mlxvlm.amount import amount
    from mlxvlm.language.quantise import Quantisation
    from mlxvlm.weights.convert import convert

    wanted = Quantisation(q_bits, q_group_size, q_mode or "affine", quant_predicate)
    done = convert(
        model,
        out,
        dtype=dtype,
        quantisation=wanted if quantize else None,
        parts=parts,
        revision=revision,
        language=language,
        vision=vision,
        resize=resize or "",
        report=lambda download: typer.echo(str(download), err=True),
    )
    typer.echo(f"Saved {out}: {amount(done.bytes)}, {done.bits_per_weight:.2f} bits a weight.")
    for how, layers in done.layers.most_common():
        typer.echo(f"  {layers:,} layers in {how}")
    if done.left:
        typer.echo(f"  as they were, for no group fits: {', '.join(done.left)}")
    typer.echo(f"Talk to it: mlxvlm chat -m {out}")
