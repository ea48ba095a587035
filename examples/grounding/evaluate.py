"""How well a model says where things are, on pictures that it has not seen.

    python -m examples.grounding.evaluate --model runs/grounding/model --before runs/grounding/base

Boxes are read from the generated answer as `mlxvlm.boxes` reads any model's; an answer without one
counts as 0. `blind` always answers the one box that fits best on the training scenes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import mlxvlm
from examples.grounding.scenes import HELD_OUT, exactly, iou, make, middle, name, picture, questions
from examples.shapes.world import Box, Thing
from mlxvlm.boxes import parse

STEP = 100  # of the boxes that the guesser tries


def ask(vlm: Any, asked: Sequence[tuple[int, Thing, int]]) -> list[str]:
    """Answers to (seed, thing, which of its questions)."""
    rows = []
    for seed, thing, which in asked:
        question, _ = questions(thing)[which]
        rows.append(([{"role": "user", "content": question}], [picture(make(seed))]))
    found = dict(vlm.batch(rows, max_tokens=20, temperature=0.0))
    return ["" if isinstance(r := found[at], Exception) else r.text for at in range(len(rows))]


def measure(vlm: Any, count: int, start: int = HELD_OUT) -> dict[str, float]:
    """Of `count` held-out pictures, the first thing of each: mean IoU of its box, the share of 0.5
    and more, of points within the box, and of names right at a point and in a box."""
    things = [(seed, make(seed).things[0]) for seed in range(start, start + count)]
    every = ask(vlm, [(*one, which) for one in things for which in range(4)])
    said = [every[which::4] for which in range(4)]
    wanted = [exactly(thing) for _, thing in things]
    overlaps = [overlap(text, box) for text, box in zip(said[0], wanted, strict=True)]
    names = [name(thing) for _, thing in things]
    return {
        "mean IoU": sum(overlaps) / count,
        "IoU 0.5": sum(value >= 0.5 for value in overlaps) / count,
        "point inside": sum(map(inside, said[1], wanted)) / count,
        "named at a point": sum(map(str.__eq__, said[2], names)) / count,
        "named in a box": sum(map(str.__eq__, said[3], names)) / count,
    }


def overlap(text: str, wanted: Box) -> float:
    """IoU of the first box that a text names; 0 where there is none."""
    found = [box for box in parse(text)[0] if not box.is_point]
    if not found:
        return 0.0
    one = found[0]
    return iou((one.x0, one.y0, one.x1, one.y1), wanted)


def inside(text: str, wanted: Box) -> bool:
    """Whether the first point that a text names lies in a box."""
    found = [box for box in parse(text)[0] if box.is_point]
    left, top, right, bottom = wanted
    return bool(found) and left <= found[0].x0 <= right and top <= found[0].y0 <= bottom


def blind(count: int = 400, start: int = HELD_OUT) -> dict[str, float]:
    """What one box, point and name, the same for every picture, are worth: the best on `count`
    training scenes, measured on as many held-out ones."""
    known, new = ([make(s).things[0] for s in range(at, at + count)] for at in (0, start))
    sides = range(0, 1001, STEP)
    spans = [(a, b) for a, b in itertools.combinations(sides, 2) if b - a >= 2 * STEP]
    boxes = [(float(x0), float(y0), float(x1), float(y1)) for x0, x1 in spans for y0, y1 in spans]
    few = [exactly(thing) for thing in known[:60]]
    best = max(boxes, key=lambda box: sum(iou(box, other) for other in few))
    overlaps = [iou(best, exactly(thing)) for thing in new]
    middles = [middle(thing) for thing in known]
    x, y = (round(sum(m[axis] for m in middles) / count) for axis in (0, 1))
    names = [name(thing) for thing in known]
    usual = max(set(names), key=names.count)
    right = sum(name(thing) == usual for thing in new) / count
    return {
        "mean IoU": sum(overlaps) / count,
        "IoU 0.5": sum(value >= 0.5 for value in overlaps) / count,
        "point inside": sum(inside(f"[{x},{y}]", exactly(thing)) for thing in new) / count,
        "named at a point": right,
        "named in a box": right,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--before", default="", help="The model before it was trained.")
    parser.add_argument("--pictures", type=int, default=100)
    args = parser.parse_args()
    columns = {"blind": blind()}
    for title, folder in (("before", args.before), ("after", args.model)):
        if folder:
            columns[title] = measure(mlxvlm.load(folder), args.pictures)
    print(f"{args.pictures} held-out pictures" + "".join(f"{title:>10}" for title in columns))
    for row in columns["blind"]:
        values = "".join(f"{column[row]:>10.3f}" for column in columns.values())
        print(f"{row:{len(str(args.pictures)) + 18}}{values}")


if __name__ == "__main__":
    main()
