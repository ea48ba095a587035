"""`mlxvlm score`: SigLIP's probability that a text fits a picture."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer


def score(
    image: Annotated[str, typer.Argument(help="A picture.")],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Texts to hold against it.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A SigLIP, as a folder or a hub id (google/siglip-base-patch16-224).",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="What it is computed in. Default: as stored."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Let IMAGE be an http(s) address.")
    ] = False,
) -> None:
    """How well each TEXT fits IMAGE: a probability each, which need not sum to 1."""
    from mlxvlm.score import score as score_pairs
    from mlxvlm.weights.load import load_siglip

    parts = load_siglip(model, dtype=dtype, revision=revision, report=_report)
    values = score_pairs(*parts, [image], texts, allow_urls=allow_urls)[0].tolist()
    if as_json:
        scores = [{"text": t, "score": v} for t, v in zip(texts, values, strict=True)]
        typer.echo(json.dumps({"model": model, "image": image, "scores": scores}))
        return
    for text, value in zip(texts, values, strict=True):
        typer.echo(f"{value:7.2%}  {text}")


def _report(download: object) -> None:
    typer.echo(str(download), err=True)
