"""`mlxvlm bench`: how quick a model is here, beside what this computer could do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlxvlm.amount import amount
from mlxvlm.cli.chat import DEMO, ModelOrDemo, demo
from mlxvlm.cli.progress import LiveLine, say

if TYPE_CHECKING:
    from mlxvlm.machine.bench import Bench, Rate


def bench(
    model: ModelOrDemo = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=2,
            help="Tokens of a prompt and of a row of training, the picture's included. Default: "
            "256, or a picture's and 64 more.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=2, help="Tokens of an answer.")
    ] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows of a step of training.")
    ] = 4,
    stage: Annotated[
        Literal["pretrain", "sft", "lora"], typer.Option("--stage", help="What trains.")
    ] = "lora",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs of each; long ones have fewer.")
    ] = 5,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="What it is computed in. Default: as stored."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="A folder on the disk to measure; what is put there is deleted again. Default: "
            "where temporary files go.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure how quick a model is: pictures, prompts, answers, training, the embedding cache.

    Each rate is a median of several runs, and beside it stands its share of what this computer
    reaches in matrix products, memory or files alone. It takes half a minute with the demo model.
    """
    from mlxvlm.errors import UsageError

    if folder is not None and not folder.is_dir():
        raise UsageError(f"--folder {folder} is no folder that is there: name one on the disk.")

    from mlxvlm.machine.bench import bench as measure
    from mlxvlm.weights.load import load

    line = LiveLine()
    try:
        line.show("loading the model")
        vlm = load(model or demo(), dtype=dtype, revision=revision, report=_report)
        found = measure(
            vlm,
            length=length,
            answer=max_tokens,
            rows=batch_size,
            stage=stage,
            repeats=repeats,
            folder=folder,
            progress=lambda what: line.show(f"measuring {what}"),
        )
    finally:
        line.clear()
    name = model or DEMO
    typer.echo(json.dumps({"model": name} | describe(found)) if as_json else page(name, found))


def describe(found: Bench) -> dict[str, Any]:
    """The measurements as JSON values: rates in their units, FLOP/s, bytes a second."""
    told = {k: v for k, v in vars(found).items() if k != "rates"}
    told["rates"] = [
        vars(rate) | {k: getattr(rate, k) for k in ("median", "low", "high", "share")}
        for rate in found.rates
    ]
    return told


def page(name: str, found: Bench) -> str:
    """The table, for a terminal of 80 columns."""
    text = [
        f"{name} on {found.device}",
        f"encoder in {found.vision}, projector in {found.projector}, language model in "
        f"{found.language}",
        f"a picture is {found.visual} tokens of {found.length}; {found.answer} are answered; "
        f"{found.rows} rows a step",
        "",
        f"  {'':<18}{'median':>14}{'slowest to quickest':>21}   of the ceiling",
    ]
    text += [_row(rate) for rate in found.rates]
    cache = [rate for rate in found.rates if rate.bound == "the disk"]
    if cache:
        speeds = " and ".join(f"{amount(rate.median * rate.bytes)}/s" for rate in cache)
        text += [
            f"  (a picture's features are {amount(cache[0].bytes)} in {found.codec}: {speeds})"
        ]
    products = ", ".join(f"{_flops(rate)} in {dtype}" for dtype, rate in found.matmul.items())
    text += [
        "",
        "The ceilings, measured just now:",
        f"  matrix products {products}",
        f"  memory          {amount(found.memory)}/s",
        f"  the disk        {amount(found.disk_write)}/s written, "
        f"{amount(found.disk_read)}/s read again",
        "",
        f"At most {amount(found.peak_memory)} of memory were MLX's.",
    ]
    return "\n".join(text)


def _row(rate: Rate) -> str:
    share = _share(rate.share or 0.0)
    spread = f"{_digits(rate.low)} to {_digits(rate.high)}"
    median = f"{_digits(rate.median)} {rate.unit}"
    return f"  {rate.name:<18}{median:>14}{spread:>21}{share:>7} {rate.bound}"


def _share(value: float) -> str:
    if value < 0.0005:
        return "<0.1%" if value else ""
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _report(download: object) -> None:
    say(str(download))
