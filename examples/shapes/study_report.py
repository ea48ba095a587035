"""The studies' results as Markdown tables and one picture.

Two intervals stand beside each mean, because they answer two questions. Student's t over the runs:
where would the mean of many more of them lie? With three runs it is wide, and with one it does not
exist. Wilson's over all questions of all runs: how exactly are these very models known?
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from examples.shapes.exam import wilson
from examples.shapes.study_data import KINDS, blind
from examples.shapes.study_variants import ALL, LABELS, NAMES, STUDIES

# Student's t, two-sided 95%, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TITLES = {
    "projectors": "Projectors",
    "parts": "What trains beside a fresh projector, and from what features",
    "recipe": "What the recipe's parts do",
    "amount": "Fewer pictures",
    "second": "The second stage, with less of its data",
}
SECOND = "second"  # the study of the second stage and of chats; others are of the first
DASH = "–"
BLIND_EACH, BLIND_SCENES = 60, 960

Runs = list[dict[str, Any]]


@dataclass(frozen=True)
class Share:
    """Shares of one variant's runs: their mean and both 95% intervals; `t` needs two runs."""

    each: tuple[float, ...]
    mean: float
    t: tuple[float, float] | None
    wilson: tuple[float, float]


def share(runs: Sequence[Sequence[Sequence[int]]]) -> Share:
    """runs: for each run its (right, asked) by kind; a run's share is the mean over its kinds."""
    each = tuple(sum(right / asked for right, asked in run) / len(run) for run in runs)
    mean, interval = statistics.mean(each), None
    if len(each) > 1:
        half = T[len(each) - 1] * statistics.stdev(each) / math.sqrt(len(each))
        interval = (max(0.0, mean - half), min(1.0, mean + half))
    right = sum(right for run in runs for right, _ in run)
    asked = sum(asked for run in runs for _, asked in run)
    return Share(each, mean, interval, wilson(right, asked))


def collect(out: Path) -> dict[str, Runs]:
    """Finished runs by variant, in the order of their seeds."""
    found: dict[str, Runs] = {}
    for variant in ALL:
        files = sorted((out / "runs").glob(f"{variant.name}-[0-9]*/result.json"))
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        runs = [run for run in runs if run["variant"] == variant.name]
        if runs:
            found[variant.name] = sorted(runs, key=lambda run: run["seed"])
    return found


def of(runs: Runs, stage: str) -> Share | None:
    """The share right after a stage; None where none ran, or not that stage."""
    if not runs or not all(stage in run for run in runs):
        return None
    return share([[run[stage]["right"][kind] for kind in KINDS] for run in runs])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(pair: tuple[float, float] | None) -> str:
    return DASH if pair is None else f"{percent(pair[0])} to {percent(pair[1])}"


def least(runs: Runs, name: str) -> float:
    """Of the first stage, in the run that was disturbed least."""
    stage = "pretrain" if "pretrain" in runs[0] else "sft"
    return min(run[stage][name] for run in runs)


def table(study: str, found: dict[str, Runs]) -> str:
    """One study's rows; those that have not run are left out."""
    stage = "sft" if study == SECOND else "pretrain"
    head = ["", "runs", "right, %", "t interval", "Wilson", *KINDS]
    head += ["chats"] if study == SECOND else []
    head += ["tokens a picture", "projector", "step, CPU s", "peak, MB"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name in STUDIES[study]:
        runs = found.get(name, [])
        right = of(runs, stage)
        if right is None:
            continue
        kinds = [*KINDS, "chats"] if study == SECOND else KINDS
        each = [share([[run[stage]["right"][kind]] for run in runs]).mean for kind in kinds]
        cells = [
            label(study, name),
            str(len(runs)),
            f"**{percent(right.mean)}**",
            interval(right.t),
            interval(right.wilson),
            *(f"{100 * value:.0f}" for value in each),
        ]
        cells += [
            str(runs[0]["tokens_a_picture"]),
            f"{runs[0]['parameters']['projector'] / 1000:.0f} k",
            f"{least(runs, 'step_cpu_s'):.3f}",
            f"{least(runs, 'peak_memory_mb'):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def label(study: str, name: str) -> str:
    return LABELS.get((study, name), NAMES[name].label)


SCALE = 2  # the picture is drawn for screens of double density
LEFT, PLOT, RIGHT, LINE, TOP = 330, 470, 170, 24, 46
INK, FAINT, GRID, DOT, GUESS = "#202428", "#6b7280", "#dfe3e8", "#2563c9", "#c05621"


def draw(found: dict[str, Runs], path: Path, guessed: float) -> None:
    """Every study's rows: a run is a small ring, the mean a dot, Wilson's interval a line.

    guessed: the share that is right without a picture, as a line over all.
    """
    rows: list[tuple[str, str, Share | None]] = []
    for study, names in STUDIES.items():
        stage = "sft" if study == SECOND else "pretrain"
        here = [(study, name, of(found.get(name, []), stage)) for name in names]
        here = [row for row in here if row[2] is not None]
        rows += [(study, "", None), *here] if here else []
    size = (LEFT + PLOT + RIGHT, TOP + LINE * len(rows) + 28)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(image)
    font, bold = (ImageFont.load_default(points * SCALE) for points in (13, 14))

    def text(
        x: float, y: float, said: str, anchor: str, fill: str = INK, big: bool = False
    ) -> None:
        pen.text((x * SCALE, y * SCALE), said, fill, bold if big else font, anchor)

    def line(x0: float, y0: float, x1: float, y1: float, fill: str, width: float) -> None:
        points = [v * SCALE for v in (x0, y0, x1, y1)]
        pen.line(points, fill, round(width * SCALE))

    def ring(x: float, y: float, radius: float, fill: str | None, edge: str) -> None:
        around = [v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        pen.ellipse(around, fill, edge, round(1.2 * SCALE))

    for tick in range(0, 101, 20):
        x = LEFT + PLOT * tick / 100
        line(x, TOP - 6, x, size[1] - 12, GRID, 1)
        text(x, TOP - 12, f"{tick}%", "mb", FAINT)
    x = LEFT + PLOT * guessed
    line(x, TOP - 6, x, size[1] - 12, GUESS, 1)
    text(x + 3, size[1] - 14, "without the picture", "lb", GUESS)
    text(LEFT + PLOT + RIGHT - 12, TOP - 12, "tokens   CPU s/step", "rb", FAINT)
    for at, (study, name, result) in enumerate(rows):
        y = TOP + LINE * (at + 0.5)
        if result is None:
            text(12, y, TITLES[study], "lm", big=True)
            continue
        runs = found[name]
        text(LEFT - 14, y, label(study, name), "rm")
        low, high = (LEFT + PLOT * v for v in result.wilson)
        line(low, y, high, y, DOT, 2.5)
        for value in result.each:
            ring(LEFT + PLOT * value, y, 3, "white", FAINT)
        ring(LEFT + PLOT * result.mean, y, 4, DOT, DOT)
        text(LEFT + PLOT + 60, y, str(runs[0]["tokens_a_picture"]), "rm", FAINT)
        text(size[0] - 40, y, f"{least(runs, 'step_cpu_s'):.2f}", "rm", FAINT)
    image.save(path)


def fill(page: Path, found: dict[str, Runs]) -> None:
    """Writes each table anew between its marks in a Markdown page."""
    text = page.read_text(encoding="utf-8")
    for study in STUDIES:
        marks = (f"<!-- {study} -->\n", f"<!-- end of {study} -->")
        if not all(text.count(mark) == 1 for mark in marks):
            raise ValueError(f"{page} needs one {marks[0].strip()} and one {marks[1]}.")
        before, rest = text.split(marks[0])
        text = before + marks[0] + table(study, found) + "\n" + marks[1] + rest.split(marks[1])[1]
    page.write_text(text, encoding="utf-8")


def write(
    out: Path, plot: Path | None = None, to_json: Path | None = None, page: Path | None = None
) -> None:
    """Prints all tables that have rows; draws, fills in and keeps the results where asked to."""
    found = collect(out)
    guessed = blind(BLIND_EACH, BLIND_SCENES)
    print(f"Right without a picture: {percent(guessed)}%\n")
    if page:
        fill(page, found)
    for study in STUDIES:
        if any(name in found for name in STUDIES[study]):
            print(f"### {TITLES[study]}\n\n{table(study, found)}\n")
    if plot:
        draw(found, plot, guessed)
    if to_json:
        every = [run for runs in found.values() for run in runs]
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in every)
        to_json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
