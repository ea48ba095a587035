"""`mlxvlm cache-embeddings`: a frozen encoder's features, computed once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlxvlm.amount import amount
from mlxvlm.cli.cache import MaxTiles
from mlxvlm.cli.cache_plan import describe_plan, plan_line, plan_table
from mlxvlm.cli.progress import LiveLine, duration, list_skipped, say
from mlxvlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from mlxvlm.cache.run import Summary


TIMED = 256


def cache_embeddings(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="Pictures: a folder, rows that name them (.json, .jsonl), WebDataset .tar or "
            ".parquet files, a folder of those, or a data set of the hub.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The cache; an unfinished one goes on.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            "--vision",
            metavar="MODEL",
            help="Whose encoder: SigLIP, CLIP, InternViT, or a whole model; a folder or a hub id.",
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="What names are relative to. Default: DATA's folder."
        ),
    ] = None,
    codec: Annotated[
        Literal["float32", "bf16", "fp16", "int8", "int4"],
        # int8: half of bf16's bytes for an error of under 1%, at most 1.2% of any channel's
        # deviation (tests/benchmarks/cache_codecs.py). Projectors trained on it validate as on
        # float32: 0.0% +- 0.2%; on int4, which is for who asks, 0.2% +- 2.8% (cache_study.py).
        typer.Option("--codec", help="How features are kept."),
    ] = "int8",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="What it is computed in. Default: as stored."),
    ] = None,
    pool: Annotated[
        Literal["none", "mean2"] | None,
        typer.Option(
            "--pool",
            help="mean2: 2x2 means, a quarter of the tokens. Default: a model's own, or none.",
        ),
    ] = None,
    at: Annotated[
        Literal["encoder", "projector"],
        typer.Option(
            "--at",
            help="projector: what the language model sees, where the projector trains no more.",
        ),
    ] = "encoder",
    resize: Annotated[
        Literal["squash", "crop", "pad"] | None,
        typer.Option(
            "--resize", help="As the stage of training has it. Default: the model's own way."
        ),
    ] = None,
    max_tiles: MaxTiles = 0,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Pictures at once. Default: 8, or the cache's."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first N pictures.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Only part I of N, for several machines; `mlxvlm cache merge` joins the parts.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if any picture or row of DATA is bad.")
    ] = False,
    trust_names: Annotated[
        bool,
        typer.Option(
            "--trust-names",
            help="Don't look again at pictures that DIR knows by name; they may be gone.",
        ),
    ] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures that rows name by a web address.")
    ] = False,
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Only say what it would take, from a few batches; no writing."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Go ahead past half of the free disk.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object.")
    ] = False,
) -> None:
    """Compute a frozen encoder's features once, for training to read.

    Stop it at any time: the same command goes on where it was. Training takes DIR as --cache.
    """
    from mlxvlm.cache.codecs import codec_named
    from mlxvlm.cache.inputs import picture_sources
    from mlxvlm.cache.jobs import distinct
    from mlxvlm.cache.parts import Part
    from mlxvlm.cache.writer import check_folder, settle_about, write_cache
    from mlxvlm.data.hub import local_data

    codec_named(codec)  # before a model is fetched
    part = Part.parse(shard) if shard else Part.launched()
    if part and not shard:
        out = part.folder(out)
    check_folder(out)
    data = [Path(local_data(str(one), lambda download: say(str(download)))) for one in data]
    sources, bad_rows = picture_sources(data, images, trust_names, allow_urls)
    if strict and bad_rows:
        where, reason = bad_rows[0]
        raise DataError(f"{len(bad_rows):,} rows cannot be used; the first, {where}: {reason}")

    from mlxvlm.cache.plan import make_plan
    from mlxvlm.config import EVE
    from mlxvlm.machine import backup, limits, power, sync
    from mlxvlm.weights.load import load_encoder, load_projected

    limits.allow_open_files()
    limits.limit_serving()
    if at == "projector" and pool:
        raise UsageError(
            "--pool belongs to the encoder; with --at projector the model has its own."
        )
    take = load_projected if at == "projector" else partial(load_encoder, pool=pool)
    encoder: Any = take(
        model,
        dtype=dtype,
        revision=revision,
        tiling={"resize": resize} if resize else None,
        report=lambda download: say(str(download)),
    )
    eyes = encoder.choices.vision if at == "projector" else encoder.config
    if eyes.model_type == EVE:
        encoder = _teacher_of(encoder, model, dtype, (at, pool, resize))
    jobs = distinct(sources, encoder.tiling, max_tiles)[:limit]
    del sources
    earlier: list[Any] = []
    if part:
        about = settle_about(out, encoder, codec, batch_size, None, write=False)
        earlier, jobs = part.cut(jobs, about["shard_pictures"])
    # A short run is over before its time is known.
    batches = 4 if plan_only else 2 if len(jobs) >= TIMED else 0
    plan = make_plan(
        encoder,
        jobs,
        out,
        codec,
        batch_size=batch_size,
        trust_names=trust_names,
        batches=batches,
    )
    if plan_only:
        typer.echo(json.dumps(describe_plan(plan, out)) if as_json else plan_table(plan, out))
        return
    if not yes:
        plan.refuse_if_too_large(out)
    if plan.pictures and not as_json:
        say(plan_line(plan, out))
    for warning in (power.warning(), sync.warning(out)):
        if warning:
            say(f"Warning: {warning}")
    backup.exclude(out)
    line = ProgressLine()
    try:
        with limits.awake():
            summary = write_cache(
                encoder,
                jobs,
                out,
                codec,
                batch_size=batch_size,
                strict=strict,
                trust_names=trust_names,
                progress=line.progress,
                earlier=earlier,
            )
    finally:
        line.end()
    if as_json:
        typer.echo(
            json.dumps(describe(summary, out, bad_rows) | {"plan": describe_plan(plan, out)})
        )
        return
    list_skipped([*bad_rows, *summary.failures])
    typer.echo(told(summary, out))


def _teacher_of(student: Any, model: str, dtype: str | None, given: tuple[Any, ...]) -> Any:
    """The frozen encoder that a model without one learns from."""
    from mlxvlm.train.teacher import load_teacher

    if given != ("encoder", None, None):
        raise UsageError(
            f"{model} has no frozen encoder, and its teacher's features are cached as they are: "
            "leave out --at projector, --pool and --resize."
        )
    config = student.config
    say(
        f"{model} has no frozen encoder: its patches are embedded by what trains. These are the "
        f"features of its teacher, {config.teacher}, which training takes as --teacher-cache."
    )
    return load_teacher(
        config, student.tiling, dtype=dtype, report=lambda download: say(str(download))
    )


def describe(summary: Summary, out: Path, bad_rows: list[tuple[str, str]]) -> dict[str, Any]:
    """The summary as plain JSON."""
    return {
        "out": str(out),
        "pictures": summary.total,
        "limited": summary.limited,
        "known": summary.known,
        "encoded": summary.encoded,
        "duplicates": summary.duplicates,
        "failures": [{"name": name, "reason": reason} for name, reason in summary.failures],
        "bad_rows": [{"where": where, "reason": reason} for where, reason in bad_rows],
        "views": summary.views,
        "bytes": summary.bytes,
        "shards": summary.shards,
        "seconds": round(summary.seconds, 3),
    }


def told(summary: Summary, out: Path) -> str:
    """The summary as one line."""
    parts = [f"{summary.encoded:,} encoded"]
    for count, what in (
        (summary.known, "there already"),
        (summary.duplicates, "the same as others"),
        (len(summary.failures), "failed"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    if summary.limited:
        parts.insert(0, f"{summary.limited:,} of them in fewer tiles, for rows of several")
    return (
        f"{out}: {summary.total:,} pictures ({', '.join(parts)}), {amount(summary.bytes)} "
        f"written in {duration(summary.seconds)}."
    )


class ProgressLine(LiveLine):
    """How far a cache is, on one line."""

    def progress(self, summary: Summary) -> None:
        rate = summary.encoded / max(summary.seconds, 1e-9)
        done_here = summary.done - summary.known
        left = (summary.total - summary.done) * summary.seconds / max(done_here, 1)
        text = (
            f"{summary.done:,}/{summary.total:,} pictures  {summary.views:,} views  "
            f"{rate:.1f} images/s  {amount(summary.bytes)}  {duration(left)} left"
        )
        if summary.failures:
            text += f"  {len(summary.failures):,} failed"
        self.show(text)
