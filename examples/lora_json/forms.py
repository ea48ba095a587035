"""Answers as JSON: what is in a picture, and what the ordinary answer says.

    {"items":["Top left: a big red star.","Centre: the word STOP."]}
    {"bars":[" red seven"," blue three"]}
    {"answer":"The circle is red."}

The words are those of ordinary answers, with their capitals, stops and the spaces before them:
"red" with a space before it and "red" without are two tokens of the demo's vocabulary, as are "Top"
and "top", and in its training only " red" and "Top" are ever said; a full stop is where it looks
for the next item. A form of single words, {"shape":"star","color":"red"}, would have to be taught
nearly a whole vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

from examples.shapes.phrases import OUTSIDE
from examples.shapes.qa import QA
from examples.shapes.things import short
from examples.shapes.world import NUMBERS, Scene

SUFFIX = " Answer as JSON."
DESCRIBE = ("Describe the picture as JSON.", "Describe the image as JSON.")


def dump(value: dict[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def description(scene: Scene) -> str:
    """A picture's items with their places, in reading order, or its bars from left to right."""
    if scene.bars:
        return dump({"bars": [f" {bar.color} {NUMBERS[bar.height]}" for bar in scene.bars]})
    if not scene.items:
        return dump({"answer": OUTSIDE})
    return dump({"items": [f"{item.place.capitalize()}: {short(item)}." for item in scene.items]})


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
