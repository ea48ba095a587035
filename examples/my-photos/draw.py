"""Draws stand-ins for a person's own pictures: a folder and captions.csv, as one would write it.

    python examples/my-photos/draw.py --out runs/my-photos [--count 250]

Each shows a desk with one to three things; each caption says so in this person's way. With pictures
of your own, leave this out: all that follows needs is DIR/captions.csv (file_name, text).

general.jsonl holds questions of the kind that the model can answer already, about other pictures:
what a little of LLaVA's instruction data would be for a real model.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.shapes.data import row
from examples.shapes.drawing import draw
from examples.shapes.questions import ask_many
from examples.shapes.world import Scene, make_scene, seeds

# Past what the demo model was trained on.
FIRST_SCENE = 500_000
MOST_THINGS = 3
QUESTIONS = 4


def caption(scene: Scene) -> str:
    """My desk today: an orange star and a red heart."""
    names = [
        f"{'an' if thing.color[0] in 'aeiou' else 'a'} {thing.color} {thing.shape}"
        for thing in scene.things
    ]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"My desk today: {listed}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=250)
    options = parser.parse_args()
    (options.out / "photos").mkdir(parents=True, exist_ok=True)
    found = (make_scene(seed) for seed in seeds("train", FIRST_SCENE))
    desks = islice((s for s in found if 0 < len(s.things) <= MOST_THINGS), options.count)
    with (options.out / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, scene in enumerate(desks):
            name = f"photos/{number:04}.png"
            draw(scene).save(options.out / name)
            table.writerow([name, caption(scene)])
    with (options.out / "general.jsonl").open("w", encoding="utf-8") as file:
        for number, scene in enumerate(islice(found, options.count)):
            name = f"general/{number:04}.png"
            (options.out / name).parent.mkdir(exist_ok=True)
            draw(scene).save(options.out / name)
            for qa in ask_many(scene, QUESTIONS):
                rest = row(name, [qa])
                del rest["targets"]
                file.write(json.dumps(rest) + "\n")


if __name__ == "__main__":
    main()
