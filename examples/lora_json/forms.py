"""Answers as JSON: the ordinary answer as an object, {"answer":"The circle is red."}

The words stay those of ordinary answers, whole sentences, with their capitals and stops: "red" with
a space before it and "red" without are two tokens of the demo's vocabulary, as are "Top" and "top",
and in its training only " red" and "Top" are ever said; a full stop is where it looks for the next
item. A form of single words, {"shape":"star","color":"red"}, would have to be taught nearly a whole
vocabulary; lists of sentences, or objects with places as keys, came out as JSON in 2 to 26 of 100
cases.
"""

from __future__ import annotations

import json
from typing import Any

from examples.shapes.qa import QA

SUFFIX = " Answer as JSON."
DESCRIBE = ("Describe the picture as JSON.", "Describe the image as JSON.")


def dump(value: dict[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


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
