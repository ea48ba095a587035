"""Answers as JSON: what is in a picture, and what an ordinary answer says.

    [{"place":"top left","size":"big","color":"red","shape":"star"},{"place":"centre","word":"STOP"}]
    {"shape":"circle","color":"red"}        {"color":"green","count":2}

Fields stand in the order of the ordinary answers, the key first: a small model finds the thing, then
reads it off. They are called by words that the model knows, and written without spaces, so that a
word between quotes is one token of its vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

from examples.shapes.phrases import ABSENT, NOT_THERE, plural
from examples.shapes.qa import QA
from examples.shapes.world import (
    COLORS,
    NUMBERS,
    SHAPES,
    SIZES,
    Bar,
    Print,
    Scene,
    Thing,
    place_name,
)

SUFFIX = " Answer as JSON."
DESCRIBE = ("Describe the picture as JSON.", "Describe the image as JSON.")
# The field that each kind of question asks for.
ASKED = {
    "shape": "shape",
    "color": "color",
    "size": "size",
    "at": "shape",
    "where": "place",
    "where_cs": "place",
    "count_all": "count",
    "count_color": "count",
    "count_shape": "count",
    "number": "number",
    "word": "word",
    "bar_value": "height",
}
FIELDS = {
    "size": {word: word for word in SIZES},
    "color": {word: word for word in COLORS},
    "shape": {form: word for word in SHAPES for form in (word, plural(word))},
}
PLACES = [place_name(row, column) for row in range(3) for column in range(3)]


def dump(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def item_fields(item: Thing | Print | Bar) -> dict[str, Any]:
    if isinstance(item, Bar):
        return {"color": item.color, "height": item.height}
    if isinstance(item, Print):
        return {"place": item.place} | _print(item.kind, item.text)
    return {"place": item.place, "size": item.size, "color": item.color, "shape": item.shape}


def description(scene: Scene) -> str:
    """A picture as the list of its items, in reading order; empty where nothing is drawn."""
    return dump([item_fields(item) for item in scene.bars or scene.items])


def answer(qa: QA) -> str | None:
    """The ordinary answer as an object; None for a kind, or a key, that has no form here."""
    if qa.kind not in ASKED:
        return None
    asked = ASKED[qa.kind]
    key, _, said = qa.answer.rstrip(".").partition(" is ")
    found = _words(key)
    if not found and asked not in ("count", "number", "word"):
        return None
    if said in (ABSENT, NOT_THERE):
        return dump(found | {asked: None})
    if asked in ("number", "word"):
        return dump(_print(asked, said))
    if asked in ("count", "height"):
        return dump(found | {asked: NUMBERS.index(said.removeprefix("at "))})
    return dump(found | _words(said))


def same(said: str, wanted: str) -> bool:
    """Whether a reply is JSON and says what was wanted; spaces and the order of fields are free."""
    value = parse(said)
    return value is not None and value == json.loads(wanted)


def parse(said: str) -> list | dict | None:
    """The reply as an object or a list; None where it is neither, or not JSON."""
    try:
        value = json.loads(said)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, list | dict) else None


def _print(kind: str, text: str) -> dict[str, Any]:
    return {kind: int(text) if kind == "number" else text}


def _words(text: str) -> dict[str, Any]:
    """What a phrase names: "In the top left", "a big red star", "the word STOP"."""
    *_, before, last = ["", *text.split()]
    if before in ("number", "word"):
        return _print(before, last)
    found = {}
    # The longest name first: "middle left" has no shorter name in it, "bottom centre" has.
    if place := next((p for p in sorted(PLACES, key=len, reverse=True) if p in text), None):
        found["place"] = place
    for field, words in FIELDS.items():
        for word in text.split():
            if word in words:
                found[field] = words[word]
    return found
