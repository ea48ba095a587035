"""`mlxvlm pretrain`, `sft`, `lora`: one engine, three sets of defaults.

The flags are TrainConfig's fields, so that each default and each help text lives once.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import typer

from mlxvlm.cli.launch import is_launched, launch, leave_mark
from mlxvlm.cli.progress import Progress, say
from mlxvlm.errors import UsageError
from mlxvlm.train.stages import STAGES, TrainConfig, flag_name, refuse_idle, stage_config

SHORT = {"model": "-m"}
KINDS = {"str": str, "int": int, "float": float, "bool": bool}

HELP = {
    "pretrain": "Train a projector: align an encoder's features with a frozen language model.",
    "sft": "Fine-tune projector and language model on conversations about pictures.",
    "lora": "Train low-rank adapters on the language model, and the projector with them.",
}


def train(stage: str, flags: dict[str, Any]) -> None:
    recipe, as_json = flags.pop("config"), flags.pop("as_json")
    ranks, hostfile = flags.pop("ranks"), flags.pop("hostfile") or ""
    config = stage_config(stage, flags, recipe)
    refuse_idle(stage, flags, config)
    if ranks < 1:
        raise UsageError(f"--ranks (={ranks}) must be at least 1.")
    if hostfile and ranks > 1:
        raise UsageError("--ranks and --hostfile do not go together; the file names the ranks.")
    if hostfile and not Path(hostfile).is_file():
        raise UsageError(f"--hostfile {hostfile} does not exist.")
    if (ranks > 1 or hostfile) and not is_launched():
        others = flags | {"config": recipe, "json": as_json}
        launch([stage, *arguments(others)], ranks, hostfile)
        return

    from mlxvlm.machine import limits
    from mlxvlm.train.loop import Trainer

    limits.allow_open_files()
    limits.limit_training()
    progress = Progress()
    with limits.awake():
        trainer = Trainer(config, progress.training)
        try:
            summary = trainer.run()
        finally:
            progress.end()
    if not trainer.ranks.leads:
        return
    leave_mark()
    if as_json:
        typer.echo(json.dumps(summary))
        return
    if sum(summary["skipped_steps"].values()):
        counts = ", ".join(f"{n} {why}" for why, n in summary["skipped_steps"].items() if n)
        say(f"Steps skipped: {counts}.")
    if trainer.step < trainer.steps:
        say(
            f"Stopped at step {trainer.step:,} of {trainer.steps:,} by --patience: validations in "
            f"a row without a new best: {trainer.best.stale:,}."
        )
    if summary["best"]:
        say(
            "The result is that of step {step:,}, validation loss {val_loss:.4f}.".format(
                **summary["best"]
            )
        )
    use = "--adapter-path" if config.gives_adapters else "-m"
    base = f"-m {config.model} " if config.gives_adapters else ""
    typer.echo(f"Saved {summary['out']}. Talk to it: mlxvlm chat {base}{use} {summary['out']}")


def command(stage: str) -> Any:
    """The typer command of a stage, with a signature made from TrainConfig."""

    def run(**flags: Any) -> None:
        train(stage, flags)

    parameters = [
        parameter(
            "config",
            str,
            "Recipe (TOML): the flags' names, and [[sources]] to mix data; flags win.",
        ),
        *flags_of(stage),
        parameter("ranks", int, "Processes on this machine that share the work.", None, 1),
        parameter("hostfile", str, "Or: Macs that do, as mlx.launch's --hostfile names them."),
        parameter("as_json", bool, "Print the summary as one JSON object.", ["--json"], False),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__ = stage
    run.__doc__ = HELP[stage]
    return run


def arguments(flags: dict[str, Any]) -> list[str]:
    """Flags as they are written on a command line; those that were not given are left out."""
    found: list[str] = []
    for name, value in flags.items():
        if value is True:
            found.append(flag_name(name))
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                found += [flag_name(name), str(one)]
    return found


def flags_of(stage: str | None) -> list[inspect.Parameter]:
    """TrainConfig's fields as parameters of a command; help says the stage's defaults."""
    found = []
    for name, entry in TrainConfig.__dataclass_fields__.items():
        if "help" not in entry.metadata:
            continue
        default = STAGES.get(stage or "", {}).get(name, entry.default)
        shown = "" if default in ("", False) else f" (default: {default})"
        names = [flag_name(name), *([SHORT[name]] if name in SHORT else [])]
        kind = list[str] if "several" in entry.metadata else KINDS[str(entry.type)]
        found.append(parameter(name, kind, entry.metadata["help"] + shown, names))
    return found


def parameter(
    name: str, kind: type, text: str, names: list[str] | None = None, default: Any = None
) -> inspect.Parameter:
    # None means "not given": a recipe's value, or the stage's default, then holds.
    option = typer.Option(default, *(names or [flag_name(name)]), help=text, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option,
        annotation=kind if default is not None else kind | None,
    )


pretrain, sft, lora = (command(stage) for stage in STAGES)
