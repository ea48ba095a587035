"""Writes the training data: pictures, and rows of questions with their auxiliary targets.

    DIR/images/000/000123.png   the pictures, two of five as cameras bring them
    DIR/pretrain.jsonl          8 questions a picture, each its own row, one after the other; for
                                each fourth picture a description and boxes instead
    DIR/sft.jsonl               chats of 4 turns, descriptions, questions
    DIR/val.jsonl               single questions about pictures of the "progress" split

A row's `targets` hold `ground` (what a key word refers to: for the hidden state over it), `follow`
(what is found from there in a second step) and, on a picture's first row, `align` (what each visual
token shows). They serve training only.

    python -m examples.shapes.data --out runs/shapes/data
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.shapes.camera import Map, Shot, as_drawn, shoot
from examples.shapes.drawing import patch_items
from examples.shapes.phrases import ABSENT
from examples.shapes.qa import QA, in_one_word, turns
from examples.shapes.questions import ask_many, ask_one
from examples.shapes.wording import loosely
from examples.shapes.world import (
    CELL,
    PATCH,
    SIZE,
    Scene,
    make_scene,
    place_words,
    seeds,
)

SKIP_EASY = 0.45  # of the scenes with one or two things, which teach little
QUESTIONS = 8
BOXES = 5  # of a picture that is described
BOXES_BESIDE = 4  # of the questions about another
NOTHING = 0.05  # of the pictures show nothing, besides the world's own
SHORT = 0.08  # of the single questions want one word
LOOSE = 0.3  # of the questions come as people put them
EMPTY_PATCHES = 4


def scenes(split: str, count: int, start: int = 0) -> Iterator[Scene]:
    """`count` scenes of a split, fewer of them with one or two things, more with nothing."""
    found = 0
    for seed in seeds(split, start):
        scene = make_scene(seed)
        chance = random.Random(f"skip {seed}").random()
        if 0 < len(scene.things) <= 2 and not scene.prints and chance < SKIP_EASY:
            continue
        if chance > 1 - NOTHING:
            scene = Scene(seed, scene.paper, scene.look)
        if found == count:
            return
        found += 1
        yield scene


def align(scene: Scene, found: Map | None = None) -> list[dict[str, Any]]:
    """What the visual tokens show: the words of the item that covers a patch, and for a few empty
    patches of a drawn scene, that nothing is in that place. found: as in `patch_items`."""
    shown = []
    empty = []
    side = SIZE // PATCH
    for token, item in enumerate(patch_items(scene, found)):
        if item:
            shown.append({"image": 0, "token": token, "words": list(item.words)})
        else:
            empty.append(token)
    if scene.items:
        rng = random.Random(f"empty {scene.seed}")
        for token in sorted(rng.sample(empty, min(EMPTY_PATCHES, len(empty)))):
            row, column = ((PATCH * i + PATCH // 2) // CELL for i in divmod(token, side))
            words = [ABSENT, *place_words(row, column)]
            shown.append({"image": 0, "token": token, "words": words})
    return shown


def row(image: str, qas: Sequence[QA], aligned: list[dict[str, Any]] | None = None) -> dict:
    """One row: a chat of as many turns as there are questions."""
    targets: dict[str, Any] = {"ground": [], "follow": []}
    for i, qa in enumerate(qas):
        for mark in qa.marks:
            turn = 2 * i + mark.turn
            targets[mark.target].append({"turn": turn, "end": mark.end, "words": mark.words})
    if aligned is not None:
        targets["align"] = aligned
    return {"image": image, "messages": turns(qas), "targets": targets}


def rows(image: str, chats: Sequence[Sequence[QA]], aligned: list[dict[str, Any]]) -> list[dict]:
    """Rows about one picture; the first of them says what its visual tokens show."""
    return [row(image, chat, None if i else aligned) for i, chat in enumerate(chats)]


def _put(qa: QA, rng: random.Random) -> QA:
    return loosely(qa, rng) if rng.random() < LOOSE else qa


def boxes(shot: Shot, count: int) -> list[QA]:
    """Where things' corners are; only of scenes that lie as drawn, whose boxes are known."""
    return ask_many(shot.scene, count, "boxes", {"box": 1.0}) if shot.map is None else []


def pretrain_rows(shot: Shot, image: str, count: int = QUESTIONS) -> list[dict]:
    scene = shot.scene
    rng = random.Random(f"short {scene.seed}")
    qas = boxes(shot, BOXES_BESIDE)
    qas += ask_many(scene, count - len(qas), "pretrain")
    qas = [rng.random() < SHORT and in_one_word(qa) or _put(qa, rng) for qa in qas]
    return rows(image, [[qa] for qa in qas], align(shot.drawn, shot.map))


def describe_rows(shot: Shot, image: str) -> list[dict]:
    """The whole picture in one answer, boxes, for some also a question that no picture answers.

    They have pictures of their own: rows of one picture are padded to the longest of them.
    """
    scene = shot.scene
    rng = random.Random(f"describe {scene.seed}")
    qas = [ask_one("describe", scene)]
    qas += boxes(shot, BOXES)
    qas += [ask_one("outside", scene)] if scene.seed % 3 == 0 else []
    found = [_put(qa, rng) for qa in filter(None, qas)]
    return rows(image, [[qa] for qa in found], align(shot.drawn, shot.map))


def chat_rows(shot: Shot, image: str) -> list[dict]:
    """Two chats of four turns; in some of them a turn asks for a description, a box, or something
    that no picture here answers."""
    scene = shot.scene
    rng = random.Random(f"chat {scene.seed}")
    qas = ask_many(scene, 8, "chat")
    others = {"describe": 0.3, "box": 0.3 if shot.map is None else 0.0, "outside": 0.1}
    for kind, share in others.items():
        qa = ask_one(kind, scene, "chat")
        if qa is not None and qas and rng.random() < share:
            qas[rng.randrange(len(qas))] = qa
    qas = [_put(qa, rng) for qa in qas]
    chats = [chat for chat in (qas[:4], qas[4:]) if chat]
    return rows(image, chats, align(shot.drawn, shot.map))


def name_of(index: int) -> str:
    return f"{index // 1000:03d}/{index:06d}.png"


def dump(rows: Iterable[dict], file: Any) -> None:
    for raw in rows:
        file.write(json.dumps(raw, separators=(",", ":")) + "\n")


def write(out: Path, count: int, val: int = 96, start: int = 0) -> None:
    """Writes `count` training scenes from the split's `start`-th seed on, and `val` others."""
    images = out / "images"
    with (out / "pretrain.jsonl").open("w") as pretrain, (out / "sft.jsonl").open("w") as sft:
        for i, scene in enumerate(scenes("train", count, start)):
            name = name_of(i)
            if i % 1000 == 0:
                (images / name).parent.mkdir(parents=True, exist_ok=True)
            shot = shoot(scene)
            shot.image.save(images / name, compress_level=1)
            dump((describe_rows if i % 4 == 3 else pretrain_rows)(shot, name), pretrain)
            # Two of five pictures of the second stage are chatted about, two are described.
            make = (chat_rows, describe_rows, chat_rows, describe_rows, pretrain_rows)[i % 5]
            dump(make(shot, name), sft)
    with (out / "val.jsonl").open("w") as file:
        (images / "val").mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(scenes("progress", val)):
            name = f"val/{i:06d}.png"
            shot = as_drawn(scene)
            shot.image.save(images / name, compress_level=1)
            dump(pretrain_rows(shot, name), file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the training data.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--val", type=int, default=96)
    parser.add_argument("--start", type=int, default=0, help="first seed of the training split")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out, args.scenes, args.val, args.start)
    print(f"{args.scenes} scenes in {args.out}")


if __name__ == "__main__":
    main()
