"""Questions in two steps: find one thing, then look beside it.

The answers say first what decides: the column or row of each and what follows from them, or the
place of the one found first.
"""

from __future__ import annotations

import random

from examples.shapes.phrases import ABSENT
from examples.shapes.qa import QA, ground, make
from examples.shapes.things import short, unique_name
from examples.shapes.world import COLUMNS, ROWS, Item, Scene

APART = 8.0  # pixels between two centres, from which one counts as beside the other
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDES = tuple(OPPOSITE)


def offset(side: str, a: Item, b: Item) -> float:
    """How far `a` lies on that side of `b`, in pixels; below 0 on the other."""
    along = a.x - b.x if side in ("left of", "right of") else a.y - b.y
    return along if side in ("right of", "below") else -along


def ask_relation(scene: Scene, rng: random.Random) -> QA | None:
    """Whether, or on which side, one named thing stands of another, in another third."""
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    names = [unique_name(thing, scene.things, rng) for thing in (a, b)]
    side = rng.choice(SIDES)
    across = side in ("left of", "right of")
    same = a.column == b.column if across else a.row == b.row
    if None in names or same or abs(offset(side, a, b)) < APART:
        return None
    slots = {"a": str(names[0]), "b": str(names[1])}
    words = [ground([a]), ground([b])]
    ask = f"{names[0]} {side} {names[1]}"
    holds = offset(side, a, b) > 0
    thirds = [COLUMNS[item.column] if across else ROWS[item.row] for item in (a, b)]
    answer = "".join(f"The {n}| is in the {t}. " for n, t in zip(names, thirds, strict=True))
    told = side if holds else OPPOSITE[side]
    answer += f"The {slots['a']} is {told} the {slots['b']}."
    if rng.random() < 0.5:
        answer += " Yes." if holds else " No."
        return make("relation", ask, rng, answer, words, "relation", words, side=side, **slots)
    slots |= {"side": side.removesuffix(" of"), "other": OPPOSITE[side]}
    return make("relation", f"{ask} or", rng, answer, words, "relation_or", words, **slots)


def ask_next(scene: Scene, rng: random.Random) -> QA | None:
    """What is on one side of a named thing, where that is one item or none."""
    if not scene.things or len(scene.items) < 2:
        return None
    thing = rng.choice(scene.things)
    name = unique_name(thing, scene.things, rng)
    sides = []
    for side in SIDES:
        rest = [(offset(side, item, thing), item) for item in scene.items if item is not thing]
        beside = [item for along, item in rest if along >= APART]
        if len(beside) <= 1 and not any(0 <= along < APART for along, _ in rest):
            # That there is nothing is asked less often.
            sides += [(side, beside)] * (4 if beside else 1)
    if name is None or not sides:
        return None
    side, beside = rng.choice(sides)
    what = f", in the {beside[0].place}, is {short(beside[0])}" if beside else f" is {ABSENT}"
    answer = f"The {name}| is in the {thing.place}. {side.capitalize()} it^{what}."
    key, found = ground([thing]), ground(beside)
    ask = f"{side} {name}"
    return make("next", ask, rng, answer, [key, found], asked=[key], side=side, b=name)
