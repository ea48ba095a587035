"""`mlxvlm data`: looks at training data before a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxvlm.cli.progress import LiveLine, list_skipped, say
from mlxvlm.data.mixture import FILTERS
from mlxvlm.data.response_formats import FORMATS
from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.data.check import Report

app = typer.Typer(help="Look at training data before a run.", no_args_is_help=True)

FAILED = 1
GREEN, GREY, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
BAR = 40
# Characters of one stretch of a sample that are shown; --json has them all.
SHOWN = 1000


@app.callback()
def group() -> None: ...


@app.command()
def check(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...", help="What training takes as --data; or a recipe's, with --config."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Whose tokens to count. Default: the recipe's, or the small one."
        ),
    ] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="A recipe, with its sources and limits.")
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Folder that picture names are relative to.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Look pictures up in this cache, instead of opening them."),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            "--max-seq-length",
            help="As in training. Default: 2048 with -m or --config; without, no row is too long.",
        ),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option("--filter", help=f"As in training, comma-separated: {', '.join(FILTERS)}."),
    ] = None,
    response_format: Annotated[
        str | None, typer.Option("--response-format", help=f"As in training: {', '.join(FORMATS)}.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures that rows name by a web address.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="As in training.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read only the pictures' headers, not their pixels.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Rows to show of every source.")
    ] = 3,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if anything would be left out.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Say what is in DATA, what training would leave out and why, and show what it would learn.

    Rows and pictures go the way that they go in training; what is learnt is coloured, or stands
    between {+ and +}.
    """
    from dataclasses import replace

    from mlxvlm.cache import EmbeddingCache
    from mlxvlm.cli.chat import demo
    from mlxvlm.data.check import Tiler, describe
    from mlxvlm.data.check import check as look
    from mlxvlm.data.gather import Reading, shelf_of
    from mlxvlm.data.hub import local_data
    from mlxvlm.train.stages import stage_config
    from mlxvlm.weights.load import load_prompting

    if not data and not config:
        raise UsageError("DATA is missing: name rows, or a recipe with --config.")
    given = {
        "model": model or (None if config else str(demo())),
        "data": data or None,
        "out": "unused",
        "images": images,
        "cache": cache,
        "max_seq_length": max_seq_length,
        "filter": filter,
        "response_format": response_format,
        "allow_urls": allow_urls or None,
        "seed": seed,
    }
    run = stage_config("sft", given, config)
    named = bool(model or config)
    choices, tokenizer = load_prompting(run.model, report=lambda download: say(str(download)))
    sources = [
        replace(s, data=local_data(s.data, lambda download: say(str(download))))
        for s in run.all_sources
    ]
    choices.override(run.resize, run.layout)
    tiler: Any = Tiler(choices.tiling)
    shelves = [
        shelf_of(
            source,
            tiler,
            EmbeddingCache.open(source.cache) if source.cache else None,
            choices.tiling,
            run.allow_urls,
        )
        for source in sources
    ]
    # The small model's tokens say nothing of what another model has room for.
    longest = run.max_seq_length if named or max_seq_length else sys.maxsize
    targets = tuple(run.targets)
    reading = Reading(tokenizer, choices, longest, targets, run.seed, run.allow_urls)
    line = LiveLine()

    def progress(done: int, among: int) -> None:
        line.show(f"{done:,}/{among:,} pictures")

    report = look(sources, run.mixture, shelves, reading, fast, samples, progress)
    line.clear()
    if as_json:
        typer.echo(json.dumps(describe(report) | {"model": run.model}))
    else:
        _tell(report, run.model if named else "", fast)
    if strict and not report.clean:
        raise typer.Exit(FAILED)


@app.command()
def frames(
    video: Annotated[
        Path, typer.Argument(metavar="VIDEO", help="An animation, or a video file (with PyAV).")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")],
    count: Annotated[
        int | None, typer.Option("--frames", min=1, help="The most frames. Default: 8.")
    ] = None,
    question: Annotated[str, typer.Option(metavar="TEXT", help="Of the row.")] = "What happens?",
    answer: Annotated[str, typer.Option(metavar="TEXT", help="Of the row.")] = "",
) -> None:
    """Write evenly sampled frames of VIDEO as PNG, and print the row of data that shows them."""
    from mlxvlm.frames import label
    from mlxvlm.images.video import FRAMES, open_frames

    found = open_frames(video, count or FRAMES)
    names = [f"{video.stem}-{number}.png" for number in range(1, len(found) + 1)]
    if there := [name for name in names if (out / name).exists()]:
        raise UsageError(f"{out / there[0]} exists already: name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, found, strict=True):
        image.save(out / name)
    lines = [f"{label(number)}<image>" for number in range(1, len(found) + 1)]
    turns = [{"role": "user", "content": "\n".join([*lines, question])}]
    turns.append({"role": "assistant", "content": answer})
    typer.echo(json.dumps({"images": names, "messages": turns}, ensure_ascii=False))


def _tell(report: Report, model: str, fast: bool) -> None:
    from mlxvlm.data.check import describe

    about = describe(report)
    for one in about["sources"]:
        typer.echo(
            f"{one['data']}: {one['rows']:,} rows, {one['usable']:,} usable, "
            f"{one['used']:,} in an epoch"
        )
    kinds = about["kinds"]
    typer.echo(
        f"pictures a row: one {kinds['single']:,}, several {kinds['multi']:,}, "
        f"none {kinds['text']:,}"
    )
    skipped = [(one.where, one.reason) for one in report.gathered.examples()]
    list_skipped(skipped, about["left_out"], tell=typer.echo)
    _pictures(about["pictures"], fast)
    for kind, count in about["would_filter"].items():
        typer.echo(f"{kind}: {count:,} (see --filter)")
    if not about["rows"]:
        return
    typer.echo("")
    who = model or "the small model; name yours with -m"
    typer.echo(f"tokens, as counted by {who}")
    names = list(about["tokens"]["tokens"])
    typer.echo(f"{'':<12}" + "".join(f"{name:>9}" for name in names) + f"{'in all':>14}")
    for name, values in about["tokens"].items():
        cells = "".join(f"{values[key]:>9,}" for key in names)
        typer.echo(f"{name:<12}{cells}{about['totals'][name]:>14,}")
    typer.echo("")
    most = max(count for *_, count in about["histogram"])
    for low, high, count in about["histogram"]:
        bar = "#" * -(-count * BAR // most)
        typer.echo(f"{f'{low:,}-{high:,}':>15} {count:>9,} {bar}".rstrip())
    for one in report.rendered:
        typer.echo(f"\n{one.where}")
        typer.echo(_shown(one.spans))


def _pictures(about: dict[str, Any], fast: bool) -> None:
    how = "have good headers" if fast else "open"
    if not about["named"]:
        return
    sizes = ""
    if about["width"]:
        middle = f"{about['width']['50%']} x {about['height']['50%']}"
        sizes = f"; sizes {middle} in the middle, up to "
        sizes += f"{about['width']['max']} wide and {about['height']['max']} high"
    typer.echo(f"pictures: {about['named']:,}, of which {about['opened']:,} {how}{sizes}")
    if about["bad"]:
        typer.echo(f"pictures that do not, {about['rows_lost']:,} rows with them:")
        bad = [(one["name"], one["reason"]) for one in about["bad"]]
        list_skipped(bad, tell=typer.echo)


def _shown(spans: list[tuple[str, bool]]) -> str:
    """What is learnt in green, where there is colour."""
    colour = sys.stdout.isatty()
    text = ""
    for span, learnt in spans:
        safe = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in _short(span))
        if learnt:
            text += f"{GREEN}{safe}{PLAIN}" if colour else f"{{+{safe}+}}"
        else:
            text += f"{GREY}{safe}{PLAIN}" if colour else safe
    return text


def _short(text: str) -> str:
    """A text whose middle is left out where it is long."""
    if len(text) <= SHOWN:
        return text
    ends = text[: SHOWN // 2], text[-SHOWN // 2 :]
    return f" [... {len(text) - SHOWN:,} characters ...] ".join(ends)
