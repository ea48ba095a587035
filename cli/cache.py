"""`mlxvlm cache`: looks after a folder of features."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mlxvlm.amount import amount
from mlxvlm.cli.progress import LiveLine, list_skipped, say

app = typer.Typer(help="Look after an embedding cache.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What cache-embeddings wrote.")]
MaxTiles = Annotated[
    int,
    typer.Option(
        "--max-tiles",
        min=0,
        help="Most dynamic tiles of a row's pictures, as a source of a recipe asks for fewer.",
        show_default=False,
    ),
]


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
    several = totals["tilings"] > totals["pictures"]
    tilings = f"{totals['tilings']:,} tilings of them, " if several else ""
    typer.echo(
        f"{folder}: {totals['pictures']:,} pictures under {totals['names']:,} names, {tilings}"
        f"{totals['views']:,} views, {amount(totals['bytes'])} in {totals['shards']:,} "
        f"shards, {meta['codec']}, {totals['bytes'] / max(1, totals['views']):,.0f} bytes a view"
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

    with EmbeddingCache.open(folder) as cache:
        with _counting("shards") as progress:
            problems = cache.verify(progress)
        totals = cache.totals()
        elsewhere = cache.elsewhere()
    if as_json:
        damaged = [
            {"shard": found.shard, "names": found.names, "problem": found.text}
            for found in problems
        ]
        told = {"folder": str(folder), "damaged": damaged, "elsewhere": elsewhere}
        typer.echo(json.dumps(told))
    else:
        for problem in problems:
            typer.echo(str(problem))
        if not problems:
            typer.echo(f"{folder}: {totals.pictures:,} pictures, every checksum is right.")
        if elsewhere:
            typer.echo(
                f"{len(elsewhere):,} more names, such as {elsewhere[0]}, are of pictures in the "
                "parts before this one: `mlxvlm cache merge` joins them."
            )
    if problems:
        raise typer.Exit(1)


@app.command()
def repair(
    folder: Folder,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", "--vision", metavar="MODEL", help="Whose encoder made the cache."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="What names are relative to. Default: the current one."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Encode again what is damaged, from the pictures; exit with 1 if anything stays damaged."""
    from mlxvlm.cache.about import read_about
    from mlxvlm.cache.repair import repair_cache
    from mlxvlm.machine import limits
    from mlxvlm.weights.load import load_encoder

    made_by = read_about(folder)["encoder"]
    limits.allow_open_files()
    limits.limit_serving()
    encoder = load_encoder(
        model,
        pool=made_by.get("pool", "none"),
        dtype=made_by.get("dtype"),
        revision=revision,
        report=lambda download: say(str(download)),
    )
    with limits.awake(), _counting("shards") as progress:
        done = repair_cache(encoder, folder, images or Path(), progress)
    if as_json:
        left = [{"what": what, "reason": reason} for what, reason in done.left]
        numbers = {"shards": done.shards, "pictures": done.pictures}
        typer.echo(json.dumps({"folder": str(folder), **numbers, "left": left}))
    elif done.shards or done.left:
        typer.echo(
            f"{folder}: {done.pictures:,} pictures encoded again in {done.shards:,} damaged shards."
        )
        for what, reason in done.left:
            typer.echo(f"still damaged: {what}: {reason}")
        if done.left and images is None:
            typer.echo("Names were looked up here: say where the pictures are with --images DIR.")
    else:
        typer.echo(f"{folder}: nothing is damaged.")
    if done.left:
        raise typer.Exit(1)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A cache, or a new folder.")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What is moved there.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Join caches of one encoder by moving their shards; nothing is encoded."""
    from mlxvlm.cache import EmbeddingCache
    from mlxvlm.cache.merge import merge_caches

    with _counting("shards") as progress:
        merged = merge_caches(out, folders, progress)
    with EmbeddingCache.open(out) as cache:
        totals = dataclasses.asdict(cache.totals())
    if as_json:
        typer.echo(json.dumps({"out": str(out), "moved": dataclasses.asdict(merged), **totals}))
        return
    typer.echo(
        f"{out}: {merged.shards:,} shards ({amount(merged.bytes)}) moved; it holds "
        f"{totals['pictures']:,} pictures under {totals['names']:,} names now. Empty, and no "
        f"longer needed: {', '.join(map(str, folders))}"
    )


@app.command()
def prune(
    folder: Folder,
    keep: Annotated[
        list[Path],
        typer.Option("--keep", metavar="DATA", help="What still needs its pictures; repeatable."),
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="What names in DATA are relative to."),
    ] = None,
    max_tiles: MaxTiles = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Drop the pictures that DATA does not name. Do not train from the cache meanwhile."""
    from mlxvlm.cache.inputs import picture_sources
    from mlxvlm.cache.prune import prune_cache
    from mlxvlm.errors import DataError

    sources, bad = picture_sources(keep, images, trust_names=True)
    if bad:
        where, reason = bad[0]
        list_skipped(bad)
        raise DataError(
            f"{len(bad):,} rows of the data to keep cannot be read ({where}: {reason}), and their "
            "pictures would be dropped: mend the rows first."
        )
    with _counting("shards") as progress:
        names = ((s.name, s.among) for s in sources)
        pruned = prune_cache(folder, names, images, progress, max_tiles)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **dataclasses.asdict(pruned)}))
        return
    typer.echo(
        f"{folder}: {pruned.dropped:,} pictures dropped and {pruned.kept:,} kept; "
        f"{amount(pruned.bytes)} are free again ({pruned.rewritten:,} shards written anew, "
        f"{pruned.removed:,} removed)."
    )


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on one line of a terminal, and none elsewhere."""
    line = LiveLine()
    try:
        yield lambda done, total: line.show(f"{done:,}/{total:,} {what}")
    finally:
        line.end()
