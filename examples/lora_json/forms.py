"""Answers as JSON: what is in a picture, and what the ordinary answer says.

    {"Top left":"a big red star","Centre":"the word STOP"}      {"The red bar":7,"The blue bar":3}
    {"answer":"The circle is red."}

Each item is named by its place, which no other item has. The words are those of ordinary answers,
capitals and spaces before them too: "red" with a space before it and "red" without are two tokens
of the demo's vocabulary, as are "Top" and "top", and in its training only " red" and "Top" are ever
said. A form of single words, {"shape":"star","color":"red"}, would have to be taught nearly a whole
vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

from examples.shapes.phrases import OUTSIDE
from examples.shapes.qa import QA
from examples.shapes.things import short
from examples.shapes.world import Scene

SUFFIX = " Answer as JSON."
DESCRIBE = ("Describe the picture as JSON.", "Describe the image as JSON.")


def dump(value: dict[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def description(scene: Scene) -> str:
    """A picture's items by their places in reading order, or its bars from left to right."""
    if scene.bars:
        return dump({f"The {bar.color} bar": bar.height for bar in scene.bars})
    if not scene.items:
        return dump({"answer": OUTSIDE})
    return dump({item.place.capitalize(): short(item) for item in scene.items})


def answer(qa: QA) -> str:
    """The ordinary answer as an object."""
    return dump({"answer": qa.answer})


def parse(said: str) -> dict[str, Any] | None:
    """A reply as an object; None where it is none."""
    try:
        value = json.loads(said)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def right(said: str, wanted: str) -> bool:
    """Whether a reply is an object and says what was wanted; spaces and order are free."""
    value = parse(said)
    return value is not None and value == json.loads(wanted)
