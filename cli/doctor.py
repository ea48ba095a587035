"""`mlxvlm doctor`: what is right and wrong with this installation and machine, and what to do."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxvlm.cli.boundary import FAILED
from mlxvlm.cli.chat import demo
from mlxvlm.cli.progress import LiveLine

if TYPE_CHECKING:
    from mlxvlm.machine.doctor import Checkup
    from mlxvlm.machine.finding import Finding
    from mlxvlm.machine.numerics import Difference

WIDEST = 100
NAME = 12
MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG", "not checked": "-"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Look at versions, device, memory, disk, the hub and the GPU's numbers; say what to mend.

    Exit code 0: nothing is wrong; 1: something is. Notes are about what works and could do better.
    """
    from mlxvlm.machine.doctor import examine

    line = LiveLine()
    try:
        found = examine(demo(), Path.cwd(), lambda what: line.show(f"looking at {what}"))
    finally:
        line.clear()
    if as_json:
        typer.echo(json.dumps(describe(found)))
    else:
        typer.echo(page(found, min(WIDEST, shutil.get_terminal_size().columns)))
    if found.wrong:
        raise typer.Exit(FAILED)


def describe(found: Checkup) -> dict[str, object]:
    """The findings as JSON values; a difference that is not finite is null."""
    layers = [
        asdict(one) | {"relative": _finite(one.relative), "wrong": one.wrong}
        for one in found.differences
    ]
    findings = [asdict(finding) for finding in found.findings]
    return {"wrong": len(found.wrong), "findings": findings, "differences": layers}


def page(found: Checkup, width: int) -> str:
    """The findings by area, for a terminal of so many columns."""
    text: list[str] = []
    for area in dict.fromkeys(finding.area for finding in found.findings):
        text.append(area)
        for finding in found.findings:
            if finding.area == area:
                text += _lines(finding, width)
        text.append("")
    if found.differences:
        text += [*_table(found.differences), ""]
    wrong, notes = len(found.wrong), sum(f.level == "note" for f in found.findings)
    said = "Nothing is wrong."
    if wrong:
        said = f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong."
    if notes:
        said += f" {notes} note{'s' if notes > 1 else ''}: what works, and could do better."
    return "\n".join([*text, said])


def _lines(finding: Finding, width: int) -> list[str]:
    start = f"  {MARKS[finding.level]:<6}{finding.name:<{NAME}} "
    says = f"not checked: {finding.says}" if finding.level == "not checked" else finding.says
    lines = _wrapped(start, says, width)
    if finding.remedy:
        advice, *commands = finding.remedy.splitlines()
        lines += _wrapped(" " * len(start) + "-> ", advice, width)
        # To be copied, so never broken.
        lines += [" " * (len(start) + 3) + command for command in commands]
    return lines


def _wrapped(start: str, text: str, width: int) -> list[str]:
    """Words, paths among them, stay whole."""
    return textwrap.wrap(
        text,
        max(width, len(start) + 20),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(differences: list[Difference]) -> list[str]:
    """Layers in rows, dtypes in columns."""
    from mlxvlm.machine.numerics import by_layer

    dtypes = list(dict.fromkeys(one.dtype for one in differences))
    text = ["Largest differences, as shares of the largest value", ""]
    text.append(" " * 42 + "".join(f"{dtype:>11}" for dtype in dtypes))
    for (part, layer), row in by_layer(differences).items():
        cells = [_cell(row[dtype]) if dtype in row else "" for dtype in dtypes]
        text.append(f"  {f'{part}, {layer}':<40}{''.join(f'{c:>11}' for c in cells)}".rstrip())
    return text


def _cell(one: Difference) -> str:
    number = f"{one.relative:.0e}" if math.isfinite(one.relative) else "none"
    return f"{number} !" if one.wrong else number


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
