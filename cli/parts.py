"""Flags for parts that a checkpoint leaves out, and for how its pictures become squares."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Language = Annotated[
    str | None,
    typer.Option(
        "--language",
        metavar="MODEL",
        help="The language model of an export that leaves it out (a projector or LoRA of LLaVA's, "
        "XTuner's folder): a folder or a hub id. Default: the one that it names.",
        show_default=False,
    ),
]
Vision = Annotated[
    str | None,
    typer.Option(
        "--vision",
        metavar="MODEL",
        help="The same for its vision tower.",
        show_default=False,
    ),
]
Resize = Annotated[
    Literal["squash", "crop", "pad"] | None,
    typer.Option(
        "--resize",
        help="How a picture becomes a square. Default: the model's own way; LLaVA-1.5 pads, also "
        "where transformers' files leave that out.",
    ),
]
