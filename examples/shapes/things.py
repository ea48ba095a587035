"""Questions about single things: attributes, places, numbers, boxes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.shapes.drawing import box
from examples.shapes.phrases import ABSENT, NOT_THERE, article, coordinate, plural
from examples.shapes.qa import QA, absent, ground, make, once, some
from examples.shapes.world import (
    COLORS,
    NUMBERS,
    SHAPES,
    SIZE,
    SIZES,
    Print,
    Scene,
    Thing,
    place_name,
)

ALL_COLORS = sorted(COLORS)


def short(item: Thing | Print) -> str:
    """What answers call an item: "a big red star", "the word STOP", "the number 47"."""
    if isinstance(item, Print):
        return f"the {item.kind} {item.text}"
    return f"a {item.size} {item.color} {item.shape}"


def unique_name(thing: Thing, things: Sequence[Thing], rng: random.Random) -> str | None:
    """What only this thing is called, by its shape or by colour and shape; None: it has no such."""
    same = [t for t in things if t.shape == thing.shape]
    names = [thing.shape] if len(same) == 1 else []
    if sum(t.color == thing.color for t in same) == 1:
        names.append(f"{thing.color} {thing.shape}")
    return rng.choice(names) if names else None


def _some_unique(scene: Scene, rng: random.Random) -> tuple[str, Thing] | None:
    named = [(unique_name(thing, scene.things, rng), thing) for thing in scene.things]
    found = [(name, thing) for name, thing in named if name is not None]
    return rng.choice(found) if found else None


def _some_shape(scene: Scene, rng: random.Random) -> tuple[str | None, list[Thing]]:
    if rng.random() < 0.12 or not scene.things:
        return absent(rng, SHAPES, {t.shape for t in scene.things}), []
    found = once(scene.things, "shape")
    if not found:
        return None, []
    thing = rng.choice(found)
    return thing.shape, [thing]


def some_pair(scene: Scene, rng: random.Random, missing: float) -> tuple[str, str, list[Thing]]:
    """A colour and a shape, with the things that have both; the missing pair is a near miss."""
    things = scene.things
    if not things or rng.random() < missing:
        pairs = {(t.color, t.shape) for t in things}
        near = [(t.color, u.shape) for t in things for u in things]
        half = [(t.color, shape) for t in things for shape in SHAPES]
        half += [(color, t.shape) for t in things for color in ALL_COLORS]
        every = [(color, shape) for color in ALL_COLORS for shape in SHAPES]
        for pool in rng.choice(((near, half, every), (half, every), (every,))):
            left = [pair for pair in pool if pair not in pairs]
            if left:
                return *rng.choice(left), []
    thing = rng.choice(things)
    same = [t for t in things if (t.color, t.shape) == (thing.color, thing.shape)]
    return thing.color, thing.shape, same


def ask_shape(scene: Scene, rng: random.Random) -> QA | None:
    if rng.random() < 0.12 or not scene.things:
        color, found = absent(rng, ALL_COLORS, {t.color for t in scene.things}), []
    else:
        found = once(scene.things, "color")
        found = [rng.choice(found)] if found else []
        color = found[0].color if found else None
    if color is None:
        return None
    what = f"a {found[0].shape}" if found else NOT_THERE
    answer = f"The {color}| shape is {what}."
    return make("shape", f"shape {color}", rng, answer, [ground(found)], color=color)


def ask_color(scene: Scene, rng: random.Random) -> QA | None:
    shape, found = _some_shape(scene, rng)
    if shape is None:
        return None
    answer = f"The {shape}| is {found[0].color if found else NOT_THERE}."
    return make("color", f"color {shape}", rng, answer, [ground(found)], shape=shape)


def ask_size(scene: Scene, rng: random.Random) -> QA | None:
    some = _some_unique(scene, rng)
    if some is None:
        return None
    name, thing = some
    answer = f"The {name}| is {thing.size}."
    return make("size", f"size {name}", rng, answer, [ground([thing])], thing=name)


def ask_largest(scene: Scene, rng: random.Random) -> QA | None:
    """Asked only where one size stands alone at the end of the scale."""
    if len(scene.things) < 2:
        return None
    smallest = rng.random() < 0.4
    pick = min if smallest else max
    limit = pick(SIZES.index(t.size) for t in scene.things)
    found = [t for t in scene.things if SIZES.index(t.size) == limit]
    if len(found) > 1:
        return None
    word = "smallest" if smallest else rng.choice(("largest", "largest", "biggest"))
    told = "smallest" if smallest else "largest"
    answer = f"The {told}| shape is a {found[0].color} {found[0].shape}."
    return make("largest", told, rng, answer, [ground(found)], extreme=word)


def ask_where(scene: Scene, rng: random.Random) -> QA | None:
    if scene.prints and rng.random() < 0.25:
        found = [rng.choice(scene.prints)]
        name = found[0].kind
        if sum(p.kind == name for p in scene.prints) > 1:
            return None
    else:
        name, found = _some_shape(scene, rng)
    if name is None:
        return None
    place = "in the " + found[0].place if found else NOT_THERE
    answer = f"The {name}| is {place}."
    return make("where", f"where {name}", rng, answer, [ground(found)], thing=name)


def ask_where_cs(scene: Scene, rng: random.Random) -> QA | None:
    color, shape, found = some_pair(scene, rng, 0.12)
    if len(found) > 1:
        return None
    place = "in the " + found[0].place if found else NOT_THERE
    thing = f"{color} {shape}"
    answer = f"The {thing}| is {place}."
    return make("where_cs", f"where {thing}", rng, answer, [ground(found)], "where", thing=thing)


def _count(
    kind: str, ask: str, rng: random.Random, key: str, found: list[Thing], **slots: str
) -> QA:
    """The places of all that count, then their number: whoever has listed them has counted them."""
    places = [f" {thing.place}" for thing in found]
    after = [ground([thing]) for thing in found] + [ground([])]
    listed = ",^".join(places) + ".^" if found else f" {ABSENT}."
    answer = f"The {key}:^{listed} The number is {NUMBERS[len(found)]}."
    first = ground(found, len(found))
    return make(kind, ask, rng, answer, [first, *after], asked=[first], **slots)


def ask_count_all(scene: Scene, rng: random.Random) -> QA | None:
    return _count("count_all", "count", rng, "shapes|", list(scene.things))


def ask_count_color(scene: Scene, rng: random.Random) -> QA | None:
    color = some(rng, ALL_COLORS, {t.color for t in scene.things}, 0.2)
    if color is None:
        return None
    found = [t for t in scene.things if t.color == color]
    return _count("count_color", f"count {color}", rng, f"{color}| shapes", found, color=color)


def ask_count_shape(scene: Scene, rng: random.Random) -> QA | None:
    shape = some(rng, SHAPES, {t.shape for t in scene.things}, 0.2)
    if shape is None:
        return None
    found = [t for t in scene.things if t.shape == shape]
    shapes = plural(shape)
    return _count("count_shape", f"count {shape}", rng, f"{shapes}|", found, shapes=shapes)


def ask_at(scene: Scene, rng: random.Random) -> QA | None:
    if scene.bars:
        return None
    ninths = {(item.row, item.column): item for item in scene.items}
    empty = [divmod(i, 3) for i in range(9) if divmod(i, 3) not in ninths]
    row, column = rng.choice(empty if rng.random() < 0.25 else sorted(ninths))
    place = place_name(row, column)
    item = ninths.get((row, column))
    answer = f"In the {place}| is {short(item) if item else ABSENT}."
    words = [ground([item] if item else [])]
    asked = _place_asked(row, column, rng)
    return make("at", f"at {place}", rng, answer, words, place=asked)


def _place_asked(row: int, column: int, rng: random.Random) -> str:
    """A ninth as people name it: "centre" is also spelt "center", or called "middle"."""
    if row == column == 1:
        return rng.choice(("centre", "centre", "center", "middle"))
    name = place_name(row, column)
    if row == 1:
        return name.replace("middle", rng.choice(("middle", "middle", "centre", "center")))
    return name.replace("centre", rng.choice(("centre", "centre", "center", "middle")))


def ask_yesno(scene: Scene, rng: random.Random) -> QA | None:
    what = rng.random()
    if what < 0.6:
        color, shape, found = some_pair(scene, rng, 0.5)
        key = f"{color} {shape}"
    elif what < 0.75:
        wanted = {t.shape for t in scene.things}
        missing = absent(rng, SHAPES, wanted) if rng.random() < 0.5 or not wanted else None
        key = missing or rng.choice(sorted(wanted))
        found = [t for t in scene.things if t.shape == key]
    elif what < 0.85:
        if not scene.things:
            return None
        t = rng.choice(scene.things)
        size = rng.choice(SIZES)
        key = f"{size} {t.color} {t.shape}"
        found = [u for u in scene.things if (u.size, u.color, u.shape) == (size, t.color, t.shape)]
    else:
        wanted = {t.color for t in scene.things}
        missing = absent(rng, ALL_COLORS, wanted) if rng.random() < 0.5 or not wanted else None
        key = missing or rng.choice(sorted(wanted))
        found = [t for t in scene.things if t.color == key]
        answer = f"{article(key).capitalize()}| shape? {'Yes' if found else 'No'}."
        words = [ground(found)]
        slots = {"color": key, "a_color": article(key)}
        return make("yesno", f"is {key}", rng, answer, words, "yesno_color", words, **slots)
    answer = f"{article(key).capitalize()}|? {'Yes' if found else 'No'}."
    return make("yesno", f"is {key}", rng, answer, [ground(found)], a_thing=article(key))


def coordinates(thing: Thing) -> tuple[int, ...]:
    """x0, y0, x1, y1 in thousandths of the picture's sides, as `box` answers have them."""
    return tuple(coordinate(v / SIZE) for v in box(thing))


def ask_box(scene: Scene, rng: random.Random) -> QA | None:
    some = _some_unique(scene, rng)
    if some is None:
        return None
    name, thing = some
    at = [str(v) for v in coordinates(thing)]
    answer = f"The {name}| is at [{', '.join(at)}]."
    # What the key refers to has a place besides its words: a third of the whole.
    words = {word: round(2 / 3 * weight, 3) for word, weight in ground([thing]).items()}
    for value in at:
        words[value] = round(words.get(value, 0.0) + 1 / 12, 3)
    return make("box", f"box {name}", rng, answer, [words], thing=name)
