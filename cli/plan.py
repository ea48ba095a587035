"""`mlxvlm plan`: will a run fit, how long will it take; and what could this Mac train tonight.

What is planned is written as it would be run: `mlxvlm sft -m base ...` is planned by
`mlxvlm plan sft -m base ...`, and a recipe by `mlxvlm plan recipe.toml`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlxvlm.amount import amount as size
from mlxvlm.cli.progress import LiveLine, duration
from mlxvlm.cli.train import flags_of, parameter
from mlxvlm.errors import UsageError
from mlxvlm.train.stages import STAGES, read_recipe, stage_config

if TYPE_CHECKING:
    from mlxvlm.machine.chips import Machine
    from mlxvlm.machine.plan import Plan
    from mlxvlm.machine.remedies import Remedy
    from mlxvlm.machine.tonight import Row

HOURS = 8.0
STEPS = 3
BAR = 24

HELP = """Say whether a run will fit, how long it will take, and what would make it fit.

`mlxvlm plan sft -m base --data rows.json` plans what `mlxvlm sft` with the same flags would run;
`mlxvlm plan recipe.toml` a recipe. Without either, it says what this Mac, or another (--memory,
--chip), could train in --hours."""


def plan(**flags: Any) -> None:
    as_json, what, stage = flags.pop("as_json"), flags.pop("what"), flags.pop("stage")
    memory, chip, hours = flags.pop("memory"), flags.pop("chip"), flags.pop("hours")
    steps = flags.pop("steps")
    if steps is not None and steps < 0:
        raise UsageError(f"--steps (={steps}) must be at least 0.")
    if hours is not None and not hours > 0:
        raise UsageError(f"--hours (={hours}) must be above 0.")

    from mlxvlm.machine.chips import machine

    if what is None and stage is None:
        if given := [name for name, value in flags.items() if value is not None]:
            raise UsageError(
                f"--{given[0].replace('_', '-')} belongs to a run: name its stage or its recipe "
                f"first, as in `mlxvlm plan sft --{given[0].replace('_', '-')} ...`."
            )
        _tonight(machine(memory, chip), hours or HOURS, as_json)
        return
    recipe = None if what in STAGES or what is None else what
    stage = stage or (what if what in STAGES else stage_of(str(recipe)))
    if stage not in STAGES:
        raise UsageError(f"--stage (={stage!r}) must be one of {', '.join(STAGES)}.")
    flags["out"] = flags["out"] or (None if recipe and "out" in read_recipe(recipe) else stage)
    config = stage_config(stage, flags, recipe)

    from mlxvlm.machine.plan import make_plan

    line, wanted = LiveLine(), STEPS if steps is None else steps
    try:
        found = make_plan(config, machine(memory, chip), wanted, line.show)
    finally:
        line.clear()
    if as_json:
        typer.echo(json.dumps(describe(found) | {"stage": stage, "hours": hours}))
    else:
        typer.echo(page(stage, found, hours))


def stage_of(recipe: str) -> str:
    """The stage of a recipe: by what it trains, or else by its name."""
    if not recipe.endswith(".toml"):
        raise UsageError(
            f"{recipe!r} is neither a stage ({', '.join(STAGES)}) nor a recipe (a .toml file)."
        )
    parts = read_recipe(recipe).get("train", "")
    for part, stage in (("lora:lm", "lora"), ("lm", "sft"), ("projector", "pretrain")):
        if part in [p.strip() for p in str(parts).split(",")]:
            return stage
    if Path(recipe).stem in STAGES:
        return Path(recipe).stem
    raise UsageError(f"{recipe} does not say what it trains: add --stage {'|'.join(STAGES)}.")


def page(stage: str, plan: Plan, hours: float | None = None) -> str:
    """The plan, for a terminal."""
    from mlxvlm.machine.step import PARTS

    left_out = f", {len(plan.skipped):,} more left out" if plan.skipped else ""
    text = [
        f"{stage} from {plan.model}",
        "",
        f"  data      {plan.rows:,} rows{left_out}; {plan.pictures:,} pictures; up to "
        f"{plan.longest:,} tokens a row",
        f"  steps     {plan.steps:,} of {plan.rows_a_step} rows",
        f"  machine   {plan.machine.name}, {gib(plan.machine.memory)}",
        "",
    ]
    rows = [(PARTS[k], plan.parts[k]) for k in PARTS if plan.parts.get(k)]
    rows.append(("Python and the rows", plan.host))
    most = max(value for _, value in rows)
    fits = "it fits." if plan.fits else "IT DOES NOT FIT."
    about = "about " if plan.estimated else ""
    room = f"a run here may use {size(plan.usable)}"
    if not plan.machine.here:
        room = f"a run there may use {size(plan.usable)}"
    text.append(f"Memory: {about}{size(plan.peak)}; {room}: {fits}")
    text.append("")
    for name, value in rows:
        bar = "█" * round(BAR * value / most) or "▏"
        text.append(f"  {name:<26}{size(value):>9}  {bar}")
    if plan.measured is not None:
        off = plan.predicted / plan.measured - 1
        text.append(
            f"  {'without Python, measured':<26}{size(plan.measured):>9}  ({off:+.1%} predicted)"
        )
    elif plan.estimated:
        text.append("  An estimate: checked on MLX's CPU backend (within 7%), not yet on a Mac.")
    text += ["", *_time(plan, hours), "", *_disk(plan)]
    if plan.encoder_share:
        text += ["", *_economics(plan)]
    if plan.resized:
        ours, before = plan.resized
        text += [
            "",
            f"Pictures: resized by {ours!r} in this stage, by {before!r} in the model that it "
            "starts from. A cache is of",
            f"one way: make this stage's with `mlxvlm cache-embeddings --resize {ours}`; one of "
            f"{before!r} is refused.",
        ]
    if not plan.fits:
        text += ["", *_remedies(plan)]
    return "\n".join(line.rstrip() for line in text)


def _time(plan: Plan, hours: float | None) -> list[str]:
    timing = plan.timing
    spread = (
        ""
        if timing.low == timing.high
        else (f" ({duration(timing.low)} to {duration(timing.high)})")
    )
    if timing.steps:
        many = "s" if timing.steps > 1 else ""
        how = f"from {timing.steps} real step{many} here"
    else:
        how = (
            f"an estimate: {plan.flops / 1e12:,.3g} TFLOP at {plan.machine.rate / 1e12:.2g} "
            f"a second.\n  {plan.machine.name}: {plan.machine.note}. "
            f"No real steps: {plan.why_no_steps}."
        )
    text = [f"Time: {duration(timing.seconds)}{spread}, {how}"]
    if timing.reading > 0.02:
        text.append(f"  {timing.reading:.0%} of it waits for pictures to be read.")
    if hours is not None and timing.seconds > 3600 * hours:
        share = 3600 * hours / timing.seconds
        text.append(
            f"  {hours:g} hours are enough for {share:.0%} of it: {int(plan.steps * share):,} "
            f"steps (--iters {int(plan.steps * share)})."
        )
    return text


def _disk(plan: Plan) -> list[str]:
    needed = plan.result + plan.checkpoints
    fits = "" if needed < plan.free else ": TOO LITTLE (--keep 1, or another --out)"
    return [
        f"Disk: {size(plan.result)} for the result, {size(plan.checkpoints)} for checkpoints at "
        f"most; {size(plan.free)} free{fits}"
    ]


def _economics(plan: Plan) -> list[str]:
    share = plan.encoder_share
    frozen = plan.parts.get("encoder", 0) + plan.parts.get("encoding", 0)
    return [
        f"The encoder is {share:.0%} of the arithmetic: a cache of features would make a step "
        f"{1 / (1 - share):.2f} times",
        f"as quick and leave {size(frozen)} of memory free, but one pass over the pictures costs "
        "as much as it",
        "saves in one epoch. It pays from the second epoch or run on.",
    ]


def _remedies(plan: Plan) -> list[str]:
    if not plan.remedies:
        least = f" All of them together still need {size(plan.least)}." if plan.least else ""
        return [
            "Nothing that this command knows makes it fit: batches of one row, --grad-checkpoint, "
            f"a cache, shorter rows, LoRA, 4-bit weights, fewer visual tokens.{least}"
        ]
    text = ["What would make it fit:", ""]
    for remedy in plan.remedies:
        text.append(f"  {remedy.flags}")
        notes = [_work(remedy), *remedy.notes]
        text.append(f"      {size(remedy.peak + plan.host)}; {'; '.join(notes)}")
    return text


def _work(remedy: Remedy) -> str:
    if abs(remedy.work - 1) < 0.02:
        return "as much work"
    return f"{remedy.work:.2f} times the work"


def _tonight(machine: Machine, hours: float, as_json: bool) -> None:
    from mlxvlm.machine.tonight import tonight

    line = LiveLine()
    try:
        rows = tonight(machine, hours, lambda name: line.show(f"working out {name}"))
    finally:
        line.clear()
    if as_json:
        told = [dataclasses.asdict(row) | {"cache_saves": row.cache_saves} for row in rows]
        typer.echo(
            json.dumps({"machine": dataclasses.asdict(machine), "hours": hours, "models": told})
        )
    else:
        typer.echo(tonight_page(machine, hours, rows))


def tonight_page(machine: Machine, hours: float, rows: list[Row]) -> str:
    """The table of what fits and how far a night goes."""
    from mlxvlm.machine.tonight import LEARNT, TEXT, encoding_seconds

    text = [
        f"What {machine.name} with {gib(machine.memory)} could train in {hours:g} hours "
        f"({machine.note}):",
        f"pictures seen, and memory of the {size(machine.usable)} that a run may use. Estimates.",
        "",
        f"{'language model':<14}{'':>6}{'tokens a':>10}"
        + "".join(f"{stage:>18}" for stage in STAGES)
        + f"{'cache':>9}{'100,000':>10}",
        f"{'':<14}{'':>6}{'picture':>10}{'':>54}{'saves':>9}{'cached':>10}",
    ]
    before = ""
    for row in rows:
        stages = {stage.stage: stage for stage in row.stages}
        cells = []
        for name in STAGES:
            stage = stages.get(name)
            if stage is None:
                cells.append("")
            elif not stage.pictures:
                cells.append(f"needs {size(stage.memory)}")
            else:
                mark = "*" if stage.checkpointed else " "
                cells.append(f"{_rounded(stage.pictures)} {size(stage.memory):>7}{mark}")
        if before and row.language != before:
            text.append("")
        name = row.language if row.language != before else ""
        before = row.language
        kind = "4-bit" if row.bits < 16 else "bf16"
        text.append(
            f"{name:<14}{kind:>6}{row.tokens:>10}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{row.cache_saves:>8.2f}x{size(100_000 * row.cache_bytes):>10}"
        )
    encoding = duration(encoding_seconds(machine, rows[0], 100_000))
    text += [
        "",
        f"A row is one picture (SigLIP-So400m, 384 pixels) and {TEXT} tokens, {LEARNT} of them "
        "learnt; features come from a",
        "cache. * with --grad-checkpoint. 196 tokens are --pool mean2. 4-bit models train by "
        "adapters alone.",
        "",
        f"The cache: encoding 100,000 pictures takes {encoding} once, as long as one epoch without "
        "a cache would spend",
        "on it; so at one epoch it saves no time, only the encoder's memory. `saves` is how much "
        "quicker every further",
        "epoch or run is: much under a small language model, next to nothing under 8B. The larger "
        "lever is fewer",
        "visual tokens: from 729 to 196 is about three times less work, and a quarter of the disk.",
    ]
    return "\n".join(line.rstrip() for line in text)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON."""
    skipped = [one._asdict() for one in plan.skipped]
    own = {"skipped": skipped, "peak": plan.peak, "fits": plan.fits}
    return dataclasses.asdict(plan) | own


def gib(size: int) -> str:
    """RAM as it is sold: 16 GB."""
    return f"{size / 2**30:.3g} GB"


def _rounded(count: int) -> str:
    """Two figures are all that an estimate has."""
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}"


def _signature() -> inspect.Signature:
    what: Any = typer.Argument(
        metavar="[STAGE|RECIPE]", help="pretrain, sft or lora, or a recipe (TOML)."
    )
    own = [
        inspect.Parameter(
            "what", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_optional(str, what)
        ),
        parameter("stage", str, "Of a recipe that does not say what it trains.", ["--stage"]),
        parameter("memory", str, "Of another Mac: 16GB. Default: this computer's.", ["--memory"]),
        parameter("chip", str, 'Of another Mac: "M2 Pro". Default: this one\'s.', ["--chip"]),
        parameter("hours", float, f"How long it may take (without a run: {HOURS:g}).", ["--hours"]),
        parameter(
            "steps", int, f"Real steps to time here; 0: arithmetic alone ({STEPS}).", ["--steps"]
        ),
        parameter("as_json", bool, "Print the plan as one JSON object.", ["--json"], False),
    ]
    return inspect.Signature([*own, *flags_of(None)])


def _optional(kind: type, argument: Any) -> Any:
    from typing import Annotated

    return Annotated[kind | None, argument]


plan.__signature__ = _signature()  # type: ignore[attr-defined]
plan.__doc__ = HELP
