"""Draws pictures and writes what is asked about them: for training, and held out.

python -m examples.lora_json.rows --out runs/lora-json [--scenes 1200] [--held-out 100]

DIR/images/         the pictures
DIR/json.jsonl      of each picture a description and three questions, answered as JSON
DIR/ordinary.jsonl  as many that are answered as before
DIR/held-out.jsonl  of each of other pictures one of every sort, for compare.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.lora_json import forms
from examples.shapes.drawing import draw
from examples.shapes.questions import ask_many, ask_one
from examples.shapes.world import Scene, make_scene, seeds

# Past what the demo model was trained on.
FIRST_SCENE = 600_000
QUESTIONS = 3


def row(form: str, image: str, question: str, answer: str) -> dict[str, Any]:
    user = {"role": "user", "content": question}
    messages = [user, {"role": "assistant", "content": answer}]
    return {"image": image, "messages": messages, "form": form}


def json_rows(scene: Scene, image: str, questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """A description, then questions."""
    found = []
    whole = ask_one("describe", scene, "json")
    if whole is not None:
        asks = (*forms.DESCRIBE, whole.question + forms.SUFFIX)
        ask = random.Random(f"json {scene.seed}").choice(asks)
        found.append(row("json description", image, ask, forms.answer(whole)))
    for qa in ask_many(scene, questions, "json"):
        found.append(row("json question", image, qa.question + forms.SUFFIX, forms.answer(qa)))
    return found


def ordinary_rows(scene: Scene, image: str, questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """The same sorts, without a word of JSON."""
    qas = [("ordinary description", ask_one("describe", scene, "ordinary"))]
    qas += [("ordinary question", qa) for qa in ask_many(scene, questions, "ordinary")]
    return [row(form, image, qa.question, qa.answer) for form, qa in qas if qa is not None]


def pictures(split: str, start: int, count: int, out: Path) -> Iterator[tuple[Scene, str]]:
    """Scenes, and the names of their pictures, which are drawn on the way."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for number, seed in zip(range(count), seeds(split, start), strict=False):
        scene, name = make_scene(seed), f"images/{split}-{number:05}.png"
        draw(scene).save(out / name)
        yield scene, name


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=1200)
    parser.add_argument("--held-out", type=int, default=100)
    options = parser.parse_args()
    taught, kept, held = [], [], []
    for scene, name in pictures("train", FIRST_SCENE, options.scenes, options.out):
        taught += json_rows(scene, name)
        kept += ordinary_rows(scene, name)
    for scene, name in pictures("heldout", 0, options.held_out, options.out):
        held += json_rows(scene, name, 1) + ordinary_rows(scene, name, 1)
    for file, rows in (("json", taught), ("ordinary", kept), ("held-out", held)):
        write(options.out / f"{file}.jsonl", rows)


if __name__ == "__main__":
    main()
