"""Questions about what is printed."""

from __future__ import annotations

import random

from examples.shapes.phrases import NOT_THERE
from examples.shapes.qa import QA, ground, make, some
from examples.shapes.world import INKS, Scene


def _read(kind: str, scene: Scene, rng: random.Random) -> QA | None:
    """The only number or word, or that there is none."""
    found = [p for p in scene.prints if p.kind == kind]
    if len(found) > 1:
        return None
    said = found[0].text if found else NOT_THERE
    return make(kind, kind, rng, f"The {kind}| is {said}.", [ground(found)])


def ask_number(scene: Scene, rng: random.Random) -> QA | None:
    return _read("number", scene, rng)


def ask_word(scene: Scene, rng: random.Random) -> QA | None:
    return _read("word", scene, rng)


def ask_text(scene: Scene, rng: random.Random) -> QA | None:
    """What is printed in one colour."""
    inks = {p.color: p for p in scene.prints}
    color = some(rng, INKS, inks, 0.12)
    if color is None:
        return None
    found = [inks[color]] if color in inks else []
    said = f"says {found[0].text}" if found else f"is {NOT_THERE}"
    answer = f"The {color}| text {said}."
    return make("text", f"text {color}", rng, answer, [ground(found)], color=color)
