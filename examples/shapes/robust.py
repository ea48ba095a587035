"""What it costs a model when scenes, or questions, come otherwise than in training.

Each row asks the same held-out questions as the row it is compared with; "cost" is the difference
of their means over kinds, in points. Three sets of questions serve:

    all        every scored kind
    steady     those whose answer stays the same where tilting or photographing moves the items: one
               near the line between two ninths may change sides (compared with: as drawn, steady)
    colourless those with no colour in question and answer, for greyscale; the other kinds are left
               out, because nothing in the picture answers them

Then: how often the model says `I only know drawn scenes.` where it should, to pictures that are no
scenes, and where it should not.

    python -m examples.shapes.robust --model runs/shapes/sft --photos ~/Pictures
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxvlm
from examples.shapes import conditions, paraphrases, photographs
from examples.shapes.drawing import draw
from examples.shapes.evaluate import Draw, Verdict, features, right_answers, verdicts
from examples.shapes.exam import take, wilson
from examples.shapes.phrases import OUTSIDE
from examples.shapes.qa import QA, turns
from examples.shapes.questions import SCORED
from examples.shapes.world import COLORS, Scene

Asked = list[tuple[Scene, QA]]
Reword = Callable[[QA, random.Random], QA]

PRINTED = ("number", "word", "text")
# Kinds that have questions without a colour.
COLOURLESS = tuple("size count_all count_shape where relation number word bars_count".split())
TILTS = (5, 10)
NO_FONT = "no other typeface was found; name a font file with --fonts"
NO_PHOTOS = "none were named; name files or folders with --photos"
PICTURES = 24  # of each painted sort
QUESTIONS = 6  # of each of the two groups, about each picture that is no scene


@dataclass(frozen=True)
class Condition:
    """How scenes, or questions, come; `questions` names the set of questions."""

    name: str
    questions: str = "all"
    render: Draw = draw
    reword: Reword | None = None


@dataclass
class Row:
    """Shares over all questions; `right` is the mean over kinds, each with as many questions.

    cost: how many points `right` lies below that of the same questions as drawn; None: it is they.
    refused: how often the answer was that only drawn scenes are known.
    """

    name: str
    questions: str
    asked: int
    right: float
    low: float
    high: float
    cost: float | None
    worst: str
    worst_right: float
    refused: float
    kinds: dict[str, float]


@dataclass
class Refusals:
    """Of what was asked about one sort of picture, how often the model said that it knows none."""

    name: str
    pictures: int
    questions: str
    asked: int
    refused: float
    low: float
    high: float


def rows_of(folder: Path, fonts: Sequence[str]) -> list[Condition]:
    """All rows; `folder` takes the files that some of them write."""
    sideways = conditions.sideways
    rows = [
        Condition("as drawn (96 px)"),
        Condition("drawn four times larger (384 px)", render=conditions.larger),
        Condition("shrunk to 64 px", render=conditions.shrunk),
        Condition("JPEG of quality 30", render=conditions.jpeg),
        Condition("grey paper", render=conditions.grey_paper),
        Condition("landscape canvas (4:3)", render=conditions.landscape),
        Condition(
            "phone file on its side, with EXIF tag",
            render=partial(sideways, folder=folder),
        ),
        Condition("as drawn, steady questions", "steady"),
        *(
            Condition(f"tilted by {n} degrees", "steady", partial(conditions.tilted, degrees=n))
            for n in TILTS
        ),
        Condition("photographed from paper", "steady", conditions.photographed),
        Condition("as drawn, questions without colours", "colourless"),
        Condition("in greyscale", "colourless", conditions.greyscale),
    ]
    if fonts:
        rows += [
            Condition("as drawn, questions about prints", "printed"),
            Condition("in other typefaces", "printed", partial(conditions.typeset, fonts=fonts)),
        ]
    return rows + [
        Condition("in other words", reword=paraphrases.paraphrased),
        Condition("in lower case, without marks", reword=paraphrases.lower_case),
        Condition("with a slip of the keyboard", reword=paraphrases.mistyped),
    ]


def question_sets(split: str, each: int) -> dict[str, Callable[[], Asked]]:
    """How to come by each set of questions, `each` of a kind."""
    return {
        "all": lambda: take(split, each, SCORED),
        "steady": lambda: take(split, each, SCORED, _steady),
        "colourless": lambda: take(split, each, COLOURLESS, _colourless),
        "printed": lambda: take(split, each, PRINTED),
    }


def _steady(scene: Scene, qa: QA) -> bool:
    maps = [conditions.camera(scene), *(conditions.tilt(scene, degrees) for degrees in TILTS)]
    return conditions.stays(scene, qa, maps)


def _colourless(scene: Scene, qa: QA) -> bool:
    return not set(re.findall("[a-z]+", f"{qa.question} {qa.answer}".lower())) & set(COLORS)


def refusals(vlm: Any, asked: Sequence[tuple[Any, QA]], found: Sequence[Verdict]) -> list[bool]:
    """Whether greedy decoding answers each (features, question) with `OUTSIDE`.

    found: the verdicts of these questions. Only answers that begin like it are looked at again.
    """
    if not asked:
        return []
    picture, qa = asked[0]
    refusal = vlm.tokenize(turns([replace(qa, answer=OUTSIDE)]), [picture])
    begins = int(refusal.tokens[refusal.supervised][0])
    likely = [i for i, verdict in enumerate(found) if verdict.first == begins]
    again = [(asked[i][0], replace(asked[i][1], answer=OUTSIDE)) for i in likely]
    refused = {i for i, said in zip(likely, right_answers(vlm, again), strict=True) if said}
    return [i in refused for i in range(len(asked))]


def measure_conditions(
    vlm: Any, split: str, each: int, fonts: Sequence[str], say: Callable[[str], None]
) -> list[Row]:
    """One row for each condition; `say` is told of each row as it is done."""
    sets = question_sets(split, each)
    # The first row of a set is the one as drawn, which the others are compared with.
    asked: dict[str, Asked] = {}
    drawn: dict[int, Any] = {}
    base: dict[str, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for condition in rows_of(Path(folder), fonts):
            name = condition.questions
            if name not in asked:
                asked[name] = sets[name]()
            scenes = [scene for scene, _ in asked[name]]
            if condition.render is draw:
                drawn |= features(vlm, (scene for scene in scenes if scene.seed not in drawn))
                seen = drawn
            else:
                seen = features(vlm, scenes, render=condition.render)
            posed = [(seen[scene.seed], _posed(scene, qa, condition)) for scene, qa in asked[name]]
            found = verdicts(vlm, posed)
            refused = refusals(vlm, posed, found)
            row = _row(condition, asked[name], found, refused, base.get(name))
            base.setdefault(name, row.right)
            rows.append(row)
            say(f"{row.name}: {100 * row.right:.1f}%")
    return rows


def _posed(scene: Scene, qa: QA, condition: Condition) -> QA:
    if condition.reword is None:
        return qa
    return condition.reword(qa, random.Random(f"{condition.name} {qa.kind} {scene.seed}"))


def _row(
    condition: Condition,
    asked: Asked,
    found: Sequence[Verdict],
    refused: Sequence[bool],
    base: float | None,
) -> Row:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for (_, qa), verdict in zip(asked, found, strict=True):
        by_kind[qa.kind].append(verdict.right)
    kinds = {kind: sum(right) / len(right) for kind, right in by_kind.items()}
    worst = min(kinds, key=lambda kind: kinds[kind])
    mean = sum(kinds.values()) / len(kinds)
    hits = sum(verdict.right for verdict in found)
    return Row(
        condition.name,
        condition.questions,
        len(asked),
        mean,
        *wilson(hits, len(asked)),
        None if base is None else 100 * (base - mean),
        worst,
        kinds[worst],
        sum(refused) / len(asked),
        kinds,
    )


def measure_refusals(vlm: Any, pictures: dict[str, list[Any]]) -> list[Refusals]:
    """For each sort of picture, and each group of questions, how often the model refuses.

    pictures: by sort, what the model opens. Two groups of `QUESTIONS` are asked about each picture:
    such as drawn scenes get, and ordinary ones that no training row has.
    """
    groups = {
        "about drawn things": photographs.drawn_questions,
        "ordinary": photographs.ordinary_questions,
    }
    found = []
    for name, images in pictures.items():
        seen = vlm.features(images)
        mx.eval([view for one in seen for view in one.views])
        for group, questions in groups.items():
            asked = [
                (picture, qa) for i, picture in enumerate(seen) for qa in questions(i, QUESTIONS)
            ]
            said = right_answers(vlm, asked)
            share = sum(said) / len(said)
            limits = wilson(sum(said), len(said))
            found.append(Refusals(name, len(images), group, len(said), share, *limits))
    return found


def strangers(photos: Iterable[Path]) -> dict[str, list[Any]]:
    """Pictures that are no scenes, by sort."""
    real = photographs.real(photos)
    textures = photographs.textures()
    return {
        **({"real photographs, whole and in parts": [image for _, image in real]} if real else {}),
        **{name: photographs.painted(name, PICTURES) for name in photographs.PAINTERS},
        "of the sorts in training": [next(textures) for _ in range(PICTURES)],
    }


def robustness(
    vlm: Any,
    split: str,
    each: int,
    fonts: Sequence[str],
    photos: Iterable[Path] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Everything, as plain values for JSON."""
    start = time.perf_counter()
    rows = measure_conditions(vlm, split, each, fonts, say)
    pictures = strangers(photos)
    refused = measure_refusals(vlm, pictures)
    skipped = {}
    if not fonts:
        skipped["in other typefaces"] = NO_FONT
    if not any("photographs" in name for name in pictures):
        skipped["real photographs"] = NO_PHOTOS
    return {
        "split": split,
        "each": each,
        "fonts": [Path(font).name for font in fonts],
        "rows": [asdict(row) for row in rows],
        "refusals": [asdict(one) for one in refused],
        "skipped": skipped,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The result as two Markdown tables."""
    lines = [
        "| how it comes | asked | right | 95% interval | cost | worst kind | refused |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in result["rows"]:
        cost = "" if row["cost"] is None else f"{row['cost']:.1f}"
        lines.append(
            f"| {row['name']} | {row['asked']} | {100 * row['right']:.1f}% "
            f"| {100 * row['low']:.1f} to {100 * row['high']:.1f} | {cost} "
            f"| {row['worst']} {100 * row['worst_right']:.0f}% | {100 * row['refused']:.1f}% |"
        )
    lines += [
        "",
        f"| no drawn scene: says `{OUTSIDE}` | pictures | questions | asked | refused "
        "| 95% interval |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for one in result["refusals"]:
        lines.append(
            f"| {one['name']} | {one['pictures']} | {one['questions']} | {one['asked']} "
            f"| {100 * one['refused']:.1f}% | {100 * one['low']:.1f} to {100 * one['high']:.1f} |"
        )
    for name, why in result["skipped"].items():
        lines.append(f"\nLeft out: {name}: {why}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what other pictures and words cost.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", choices=("heldout", "progress"), default="heldout")
    parser.add_argument("--each", type=int, default=100, help="questions of each kind")
    parser.add_argument("--fonts", nargs="+", default=None, help="font files, instead of a search")
    parser.add_argument("--photos", nargs="+", type=Path, default=(), help="files and folders")
    parser.add_argument("--out", type=Path, help="also write the result as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    fonts = conditions.installed(args.fonts or conditions.FONTS)
    # float16 is how the model is shipped; what a CPU computes quickly in is float32.
    vlm = mlxvlm.load(args.model, dtype="float32")
    say = (lambda line: None) if args.json else partial(print, flush=True)
    result = robustness(vlm, args.split, args.each, fonts, args.photos, say)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1) if args.json else "\n" + table(result))


if __name__ == "__main__":
    main()
