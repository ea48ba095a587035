"""A question with its only answer, and what each key word in them refers to.

In the templates (`phrases`) a bar `|` stands right behind a key word, in question and answer alike.
It is taken out of the text; a `Mark` keeps its place and the words of all that the key refers to.
A caret `^` stands where something has to be found by way of what was found before: the second of
two steps. Its mark is of the kind "follow", which training reads off deeper in the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from examples.shapes.phrases import ABSENT, ASKS, IN_ONE_WORD, NOT_THERE, PLURALS, plural
from examples.shapes.world import NUMBERS, Bar, Print, Thing

Words = dict[str, float]
YES_NO = ("Yes", " No")


@dataclass(frozen=True)
class Mark:
    """The key word that ends at character `end` of message `turn` (0 question, 1 answer)."""

    turn: int
    end: int
    words: Words
    target: str = "ground"


@dataclass(frozen=True)
class QA:
    """A question, its only answer, and the marks; `ask` is the question with its phrasing gone.

    template, slots: where in `ASKS` the phrasing stands, and what was put into it.
    """

    kind: str
    ask: str
    question: str
    answer: str
    marks: tuple[Mark, ...] = ()
    template: str = ""
    slots: Mapping[str, str] = field(default_factory=dict)


def ground(items: Sequence[Thing | Print | Bar], number: int | None = None) -> Words:
    """The words of all items, by weight; a bar's height and a print's text weigh three times.

    `number` adds the count as a third of the whole.
    """
    weights: Words = {}
    for item in items:
        if isinstance(item, Bar):
            pairs = [(item.color, 1.0), (NUMBERS[item.height], 3.0)]
        else:
            text = item.text if isinstance(item, Print) else None
            pairs = [(word, 3.0 if word == text else 1.0) for word in item.words]
        for word, weight in pairs:
            weights[word] = weights.get(word, 0.0) + weight
    if not weights:
        weights = {ABSENT: 1.0}
    total = sum(weights.values())
    share = 1.0 if number is None else 2 / 3
    found = {word: share * weight / total for word, weight in weights.items()}
    if number is not None:
        found[NUMBERS[number]] = found.get(NUMBERS[number], 0.0) + 1 / 3
    return {word: round(weight, 3) for word, weight in found.items()}


def lift(text: str, turn: int, words: Sequence[Words]) -> tuple[str, list[Mark]]:
    """Takes bars and carets out of a text; the n-th of them carries words[n].

    A bar behind a plural marks its stem: "circles|" ends at "circle".
    """
    *pieces, rest = re.split(r"[|^]", text)
    targets = ["ground" if sign == "|" else "follow" for sign in re.findall(r"[|^]", text)]
    marks, at = [], 0
    for piece, named, target in zip(pieces, words, targets, strict=True):
        at += len(piece)
        last = re.findall(r"[a-z]*$", piece)[0]
        stem = next((w for w in PLURALS if plural(w) == last), last)
        marks.append(Mark(turn, at - len(last) + len(stem), named, target))
    return "".join(pieces) + rest, marks


def make(
    kind: str,
    ask: str,
    rng: random.Random,
    answer: str,
    words: Sequence[Words],
    template: str | None = None,
    asked: Sequence[Words] | None = None,
    **slots: str,
) -> QA:
    """words: of the answer's marks, in order; asked: of the question's, the same by default."""
    template = template or kind
    text = rng.choice(ASKS[template])
    text = text.format(
        picture=rng.choice(("picture", "image")), colour=rng.choice(("colour", "color")), **slots
    )
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    question, first = lift(text, 0, words if asked is None else asked)
    answer, then = lift(answer, 1, words)
    return QA(kind, ask, question, answer, (*first, *then), template, slots)


def once(items: Sequence, name: str) -> list:
    """Items whose attribute `name` no other item has."""
    values = [getattr(item, name) for item in items]
    return [item for item in items if values.count(getattr(item, name)) == 1]


def absent(rng: random.Random, all_of: Sequence[str], present: set[str]) -> str | None:
    """One of `all_of` that is not present."""
    left = [word for word in all_of if word not in present]
    return rng.choice(left) if left else None


def some(
    rng: random.Random, all_of: Sequence[str], present: Collection[str], missing: float
) -> str | None:
    """One that is present; in the share `missing`, and where none is, one that is not."""
    if not present or rng.random() < missing:
        return absent(rng, all_of, set(present))
    return rng.choice(sorted(present))


def turns(qas: Sequence[QA]) -> list[dict[str, str]]:
    """The messages of a chat that asks and answers all of them."""
    found = []
    for qa in qas:
        found.append({"role": "user", "content": qa.question})
        found.append({"role": "assistant", "content": qa.answer})
    return found


def in_one_word(qa: QA) -> QA | None:
    """The question put so that it wants the looked-up word alone; None where that is not one."""
    told = qa.answer.removesuffix(".")
    one = "shape color size largest number word text".split()
    if qa.kind not in one and not qa.kind.startswith(("count", "bar")) and told[-3:] not in YES_NO:
        return None
    if told.endswith(NOT_THERE):
        return None
    question = qa.question if qa.question[-1] in "?." else qa.question + "?"
    return replace(
        qa,
        ask=qa.ask + " in one word",
        question=f"{question} {IN_ONE_WORD}",
        answer=told.split()[-1],
        marks=tuple(mark for mark in qa.marks if mark.turn == 0),
    )
