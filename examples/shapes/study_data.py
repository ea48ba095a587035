"""The smaller drawn world that the studies train and examine on.

Scenes of `MOST` shapes at most and four kinds of questions about them: small enough that a tiny
language model gets far with them in about a minute, so that many runs can be compared.

    DIR/images/000/000123.png     the pictures, the same for all variants
    DIR/ROWS/pretrain.jsonl       up to 8 questions a picture, each its own row
    DIR/ROWS/sft.jsonl            each second picture: two chats of four turns, or questions again

ROWS says how the rows are written (`Rows.name`): "restated-100" is the recipe's way.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from examples.shapes.data import align, dump, name_of, rows
from examples.shapes.drawing import draw
from examples.shapes.exam import asks
from examples.shapes.phrases import ABSENT
from examples.shapes.qa import QA
from examples.shapes.questions import MIXES, ask_many, ask_one
from examples.shapes.world import PATCH, SIZE, Scene, make_scene, seeds

KINDS = ("shape", "color", "where", "count_shape")
MOST = 3
QUESTIONS = 8
TURNS = 4

# What stands in front of the looked-up words: the key again, or the places of what is counted.
RESTATED = re.compile(r".*? (?:is at|is) (.*)")


@dataclass(frozen=True)
class Rows:
    """How rows are written.

    restated: answers say the key again ("The circle is red.", not "Red.").
    words: the tokenizer has every word whole; else targets keep the words that it has.
    percent: of the studies' pictures, evenly spread; above 100, more of them.
    grid: visual tokens a side, each of which is to name what its part of the picture shows.
    """

    restated: bool = True
    words: bool = True
    percent: int = 100
    grid: int = SIZE // PATCH

    @property
    def name(self) -> str:
        parts = ["restated" if self.restated else "direct", *([] if self.words else ["bpe"])]
        parts += [] if self.grid == SIZE // PATCH else [f"grid{self.grid}"]
        return "-".join([*parts, str(self.percent)])


def scenes(split: str) -> Iterator[Scene]:
    """The split's scenes that belong to the smaller world."""
    for seed in seeds(split):
        scene = make_scene(seed)
        if 0 < len(scene.things) <= MOST and not scene.prints:
            yield scene


def direct(qa: QA) -> QA:
    """The same question, answered without its key; the marks in the answer go with it."""
    found = RESTATED.fullmatch(qa.answer)
    if found is None:
        raise ValueError(f"no short form of {qa.answer!r} is known.")
    return replace(
        qa,
        answer=found[1][0].upper() + found[1][1:],
        marks=tuple(mark for mark in qa.marks if mark.turn == 0),
    )


def questions(scene: Scene, salt: str, restated: bool = True) -> list[QA]:
    """Up to `QUESTIONS` different questions of the smaller world's kinds."""
    mix = {kind: share for kind, share in MIXES[scene.kind].items() if kind in KINDS}
    found = ask_many(scene, QUESTIONS, salt, mix)
    return found if restated else [direct(qa) for qa in found]


def exam(each: int, restated: bool = True) -> list[tuple[Scene, QA]]:
    """`each` questions of every kind about scenes of the "progress" split."""
    missing, found = dict.fromkeys(KINDS, each), []
    for scene in scenes("progress"):
        for kind in KINDS:
            qa = ask_one(kind, scene, "exam") if missing[kind] and asks(scene, kind) else None
            if qa is not None:
                missing[kind] -= 1
                found.append((scene, qa if restated else direct(qa)))
        if not any(missing.values()):
            break
    return found


def blind(each: int, count: int) -> float:
    """The share of the examination that the most frequent answer to each question, in `count`
    training scenes, gets right without a picture."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in islice(scenes("train"), count):
        for qa in questions(scene, "blind"):
            answers[qa.ask][qa.answer] += 1
    guesses = {ask: said.most_common(1)[0][0] for ask, said in answers.items()}
    asked = exam(each)
    return sum(guesses.get(qa.ask) == qa.answer for _, qa in asked) / len(asked)


def chats(count: int, restated: bool = True) -> list[tuple[Scene, list[QA]]]:
    """Chats of `TURNS` turns about scenes of the "progress" split."""
    every = ((s, questions(s, "exam chat", restated)[:TURNS]) for s in scenes("progress"))
    return list(islice((chat for chat in every if len(chat[1]) == TURNS), count))


def pretrain_rows(scene: Scene, image: str, restated: bool = True) -> list[dict]:
    qas = questions(scene, "pretrain", restated)
    return rows(image, [[qa] for qa in qas], align(scene))


def chat_rows(scene: Scene, image: str, restated: bool = True) -> list[dict]:
    qas = questions(scene, "chat", restated)
    return rows(image, [chat for chat in (qas[:TURNS], qas[TURNS:]) if chat], align(scene))


def coarser(raw: dict, grid: int) -> dict:
    """A row whose visual tokens are a grid of larger parts: each names what its first patch names,
    items before emptiness."""
    each = SIZE // PATCH // grid
    if each == 1 or "align" not in raw["targets"]:
        return raw
    found: dict[int, dict] = {}
    marks = raw["targets"]["align"]
    for mark in sorted(marks, key=lambda mark: ABSENT in mark["words"]):
        row, column = divmod(mark["token"], SIZE // PATCH)
        token = row // each * grid + column // each
        found.setdefault(token, mark | {"token": token})
    return raw | {"targets": raw["targets"] | {"align": list(found.values())}}


def keep_words(raw: dict, known: Callable[[str], bool]) -> dict:
    """A row whose targets name only words that are known; the trainer takes no others."""
    targets: dict[str, Any] = {}
    for name, marks in raw["targets"].items():
        targets[name] = []
        for mark in marks:
            words = mark["words"]
            if isinstance(words, dict):
                words = {word: mass for word, mass in words.items() if known(word)}
            else:
                words = [word for word in words if known(word)]
            if words:
                targets[name].append(mark | {"words": words})
    return raw | {"targets": targets}


def whole_words(tokenizer: Tokenizer) -> Callable[[str], bool]:
    """Whether a word is one token inside a sentence."""
    seen: dict[str, bool] = {}

    def known(word: str) -> bool:
        if word not in seen:
            pieces = [
                tokenizer.encode(text, add_special_tokens=False) for text in (" " + word, word)
            ]
            seen[word] = any(len(piece.tokens) == 1 for piece in pieces)
        return seen[word]

    return known


def draw_pictures(images: Path, count: int) -> None:
    for i, scene in zip(range(count), scenes("train"), strict=False):
        name = images / name_of(i)
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            part = name.with_suffix(".partial")
            draw(scene).save(part, "PNG", compress_level=1)
            part.replace(name)


def texts(count: int, restated: bool = True) -> Iterator[str]:
    """What is asked and answered about the first `count` training scenes."""
    for _, scene in zip(range(count), scenes("train"), strict=False):
        for qa in questions(scene, "pretrain", restated):
            yield qa.question
            yield qa.answer


def write(out: Path, rows: Rows, count: int, tokenizer: Tokenizer | None = None) -> None:
    """Writes the rows about the `count` pictures that are 100%, a share of them, or more.

    tokenizer: one that has not every word whole; targets name only those that it has.
    """
    known = tokenizer and whole_words(tokenizer)

    def kept(found: Iterable[dict]) -> Iterator[dict]:
        for raw in found:
            raw = coarser(raw, rows.grid)
            yield keep_words(raw, known) if known else raw

    wanted = max(1, count * rows.percent // 100)
    every = max(1, 100 // rows.percent)
    folder = out / rows.name
    folder.mkdir(parents=True, exist_ok=True)
    # Whole files only: an interrupted study writes its rows again.
    parts = {name: folder / f"{name}.partial" for name in ("pretrain", "sft")}
    with parts["pretrain"].open("w") as pretrain, parts["sft"].open("w") as sft:
        taken = 0
        for i, scene in enumerate(scenes("train")):
            if taken == wanted:
                break
            if i % every:
                continue
            name = name_of(i)
            dump(kept(pretrain_rows(scene, name, rows.restated)), pretrain)
            if taken % 2 == 0:
                # A third of them keep up the single questions.
                make = pretrain_rows if taken % 6 == 4 else chat_rows
                dump(kept(make(scene, name, rows.restated)), sft)
            taken += 1
    for name, part in parts.items():
        part.replace(folder / f"{name}.jsonl")
