"""`mlxvlm cache`: looks after a folder of features."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlxvlm.cli.progress import say

app = typer.Typer(help="Look after an embedding cache.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What cache-embeddings wrote.")]


@app.command()
def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what a cache holds, and of which encoder."""
    from mlxvlm.cache import EmbeddingCache

    with EmbeddingCache.open(folder) as cache:
        totals = dataclasses.asdict(cache.totals())
        failures = cache.failures()
        damaged = cache.damaged_shards()
        meta = cache.meta
    if as_json:
        listed = [{"name": name, "reason": reason} for name, reason in failures]
        about = {**meta, **totals, "failures": listed, "damaged_shards": damaged}
        typer.echo(json.dumps({"folder": str(folder), **about}))
        return
    encoder = meta["encoder"]
    typer.echo(
        f"{folder}: {totals['pictures']:,} pictures under {totals['names']:,} names, "
        f"{totals['views']:,} views, {totals['bytes'] / 1e9:.2f} GB in {totals['shards']:,} "
        f"shards, {meta['codec']}"
    )
    for name, value in encoder.items():
        typer.echo(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    for name, reason in failures:
        typer.echo(f"failed: {name}: {reason}")
    for problem in damaged:
        typer.echo(f"damaged: {problem}")


@app.command()
def verify(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Read a whole cache; exit with 1 if anything in it is damaged, and name that."""
    from mlxvlm.cache import EmbeddingCache

    shown = False

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            shown = True
            sys.stderr.write(f"\r{done:,}/{total:,} shards")
            sys.stderr.flush()

    with EmbeddingCache.open(folder) as cache:
        problems = cache.verify(progress)
        totals = cache.totals()
    if shown:
        say("")
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "damaged": problems}))
    else:
        for problem in problems:
            typer.echo(problem)
        if not problems:
            typer.echo(f"{folder}: {totals.pictures:,} pictures, every checksum is right.")
    if problems:
        raise typer.Exit(1)
