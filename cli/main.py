"""`mlxvlm`: the commands, put together.

Heavy imports stay inside the commands, so that `mlxvlm --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import mlxvlm
from mlxvlm.cli import cache, data
from mlxvlm.cli.bench import bench
from mlxvlm.cli.boundary import Boundary
from mlxvlm.cli.build import build
from mlxvlm.cli.cache_embeddings import cache_embeddings
from mlxvlm.cli.chat import chat
from mlxvlm.cli.convert import convert
from mlxvlm.cli.doctor import doctor
from mlxvlm.cli.export import export
from mlxvlm.cli.fuse import fuse
from mlxvlm.cli.plan import plan
from mlxvlm.cli.score import score
from mlxvlm.cli.train import lora, pretrain, sft

app = typer.Typer(
    name="mlxvlm",
    cls=Boundary,
    help="Train, cache and talk to vision-language models, with MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlxvlm {mlxvlm.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


app.command()(chat)
app.command()(score)
app.command()(cache_embeddings)
app.add_typer(cache.app, name="cache")
app.add_typer(data.app, name="data")
for command in (build, pretrain, sft, lora, plan, fuse, convert, export, bench, doctor):
    app.command()(command)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter of an answer shows "?" for it, instead of an error.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # Tokenizers and transformers speak up only when something is wrong.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="mlxvlm")


if __name__ == "__main__":
    main()
