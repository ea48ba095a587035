"""Draws pictures and writes what is asked about them: for training, and held out.

    python -m examples.lora_json.rows --out runs/lora-json [--scenes 1200] [--held-out 100]

    DIR/images/         the pictures
    DIR/json.jsonl      of each picture a description and questions, answered as JSON
    DIR/ordinary.jsonl  the same sort of questions as the model has been asked so far
    DIR/held-out.jsonl  of each picture one of each, for compare.py; "form" says which
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
from examples.shapes.qa import QA
from examples.shapes.questions import ask_many, ask_one
from examples.shapes.world import Scene, make_scene, seeds

# Past what the demo model was trained on.
FIRST_SCENE = 600_000
QUESTIONS = 3


def row(image: str, question: str, answer: str, **more: str) -> dict[str, Any]:
    user = {"role": "user", "content": question}
    return {"image": image, "messages": [user, {"role": "assistant", "content": answer}]} | more


def asked(scene: Scene, salt: str) -> list[tuple[QA, str]]:
    """Questions that have a form as JSON, with that."""
    found = [(qa, forms.answer(qa)) for qa in ask_many(scene, 3 * QUESTIONS, salt)]
    return [(qa, form) for qa, form in found if form is not None]


def json_rows(scene: Scene, image: str, questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """A description, then questions."""
    whole = ask_one("describe", scene, "json")
    ask = random.Random(f"json {scene.seed}").choice(
        [*forms.DESCRIBE, *([whole.question + forms.SUFFIX] if whole else [])]
    )
    found = [row(image, ask, forms.description(scene), form="json description")]
    for qa, form in asked(scene, "json")[:questions]:
        found.append(row(image, qa.question + forms.SUFFIX, form, form="json question"))
    return found


def ordinary_rows(scene: Scene, image: str, questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """The same without the words "as JSON"."""
    qas = [("ordinary description", ask_one("describe", scene, "ordinary"))]
    qas += [("ordinary question", qa) for qa in ask_many(scene, questions, "ordinary")]
    return [row(image, qa.question, qa.answer, form=form) for form, qa in qas if qa is not None]


def pictures(split: str, count: int, out: Path) -> Iterator[tuple[Scene, str]]:
    """Scenes with something drawn in them, and the names of their pictures."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    start = FIRST_SCENE if split == "train" else 0
    found = (scene for scene in map(make_scene, seeds(split, start)) if scene.kind != "texture")
    for number, scene in zip(range(count), found, strict=False):
        name = f"images/{split}-{number:05}.png"
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
    for scene, name in pictures("train", options.scenes, options.out):
        taught += json_rows(scene, name)
        kept += ordinary_rows(scene, name)
    for scene, name in pictures("heldout", options.held_out, options.out):
        held += json_rows(scene, name, 1) + ordinary_rows(scene, name, 1)
    for file, rows in (("json", taught), ("ordinary", kept), ("held-out", held)):
        write(options.out / f"{file}.jsonl", rows)


if __name__ == "__main__":
    main()
