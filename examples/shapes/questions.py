"""Questions about a scene, their answers, and what each key word refers to.

Only questions with one right answer are asked. Every answer restates the key before the word that
has to be looked up ("The circle is red.", "In the top left is nothing."), so that a small model
finds the thing first and then reads it off.

In the templates (`phrases`) a bar `|` stands right behind a key word, in question and answer alike.
It is taken out of the text; a `Mark` keeps its place and the words of all that the key refers to.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.shapes.phrases import (
    ABSENT,
    ASKS,
    NOT_THERE,
    OUTSIDE,
    OUTSIDE_ASKS,
    PLURALS,
    article,
    plural,
)
from examples.shapes.world import (
    COLORS,
    NUMBERS,
    SHAPES,
    SIZES,
    Bar,
    Scene,
    Thing,
    place_name,
)

# Kinds that score the model; the rest are extra practice.
SCORED = (
    "shape",
    "color",
    "count_all",
    "count_color",
    "count_shape",
    "at",
    "where",
    "where_cs",
    "yesno",
    "bar_value",
)


@dataclass(frozen=True)
class Mark:
    """The key word that ends at character `end` of message `turn` (0 question, 1 answer)."""

    turn: int
    end: int
    words: dict[str, float]


@dataclass(frozen=True)
class QA:
    """A question, its only answer, and the marks; `ask` is the question with its phrasing gone."""

    kind: str
    ask: str
    question: str
    answer: str
    marks: tuple[Mark, ...] = ()


def ground(items: Sequence[Thing | Bar], number: int | None = None) -> dict[str, float]:
    """The words of all items, by weight; a bar's height weighs three times its colour.

    `number` adds the count as a third of the whole.
    """
    weights: dict[str, float] = {}
    for item in items:
        if isinstance(item, Bar):
            pairs = [(item.color, 1.0), (NUMBERS[item.height], 3.0)]
        else:
            pairs = [(word, 1.0) for word in item.words]
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


def _lift(text: str, turn: int, words: Sequence[dict[str, float]]) -> tuple[str, list[Mark]]:
    """Takes the bars out of a text; the n-th bar carries words[n].

    A bar behind a plural marks its stem: "circles|" ends at "circle".
    """
    *pieces, rest = text.split("|")
    marks, at = [], 0
    for piece, named in zip(pieces, words, strict=True):
        at += len(piece)
        last = re.findall(r"[a-z]*$", piece)[0]
        stem = next((w for w in PLURALS if plural(w) == last), last)
        marks.append(Mark(turn, at - len(last) + len(stem), named))
    return "".join(pieces) + rest, marks


def _make(
    kind: str,
    ask: str,
    rng: random.Random,
    answer: str,
    words: Sequence[dict[str, float]],
    template: str | None = None,
    asked: Sequence[dict[str, float]] | None = None,
    **slots: str,
) -> QA:
    """words: of the answer's marks, in order; asked: of the question's, the same by default."""
    text = rng.choice(ASKS[template or kind])
    text = text.format(
        picture=rng.choice(("picture", "image")), colour=rng.choice(("colour", "color")), **slots
    )
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    question, first = _lift(text, 0, words if asked is None else asked)
    answer, then = _lift(answer, 1, words)
    return QA(kind, ask, question, answer, (*first, *then))


def _once(items: Sequence, name: str) -> list:
    """Items whose attribute `name` no other item has."""
    values = [getattr(item, name) for item in items]
    return [item for item in items if values.count(getattr(item, name)) == 1]


def _absent(rng: random.Random, all_of: Sequence[str], present: set[str]) -> str | None:
    left = [word for word in all_of if word not in present]
    return rng.choice(left) if left else None


def ask_shape(scene: Scene, rng: random.Random) -> QA | None:
    if rng.random() < 0.12 or scene.bars:
        color, found = _absent(rng, sorted(COLORS), {t.color for t in scene.things}), []
    else:
        found = _once(scene.things, "color")
        found = [rng.choice(found)] if found else []
        color = found[0].color if found else None
    if color is None:
        return None
    what = f"a {found[0].shape}" if found else NOT_THERE
    answer = f"The {color}| shape is {what}."
    return _make("shape", f"shape {color}", rng, answer, [ground(found)], color=color)


def _some_shape(scene: Scene, rng: random.Random) -> tuple[str | None, list[Thing]]:
    if rng.random() < 0.12 or scene.bars:
        return _absent(rng, SHAPES, {t.shape for t in scene.things}), []
    found = _once(scene.things, "shape")
    if not found:
        return None, []
    thing = rng.choice(found)
    return thing.shape, [thing]


def ask_color(scene: Scene, rng: random.Random) -> QA | None:
    shape, found = _some_shape(scene, rng)
    if shape is None:
        return None
    answer = f"The {shape}| is {found[0].color if found else NOT_THERE}."
    return _make("color", f"color {shape}", rng, answer, [ground(found)], shape=shape)


def ask_where(scene: Scene, rng: random.Random) -> QA | None:
    shape, found = _some_shape(scene, rng)
    if shape is None:
        return None
    place = "in the " + found[0].place if found else NOT_THERE
    answer = f"The {shape}| is {place}."
    return _make("where", f"where {shape}", rng, answer, [ground(found)], thing=shape)


def _some_pair(scene: Scene, rng: random.Random, absent: float) -> tuple[str, str, list[Thing]]:
    """A colour and a shape, with the things that have both; the absent pair is a near miss."""
    things = scene.things
    if not things or rng.random() < absent:
        pairs = {(t.color, t.shape) for t in things}
        near = [(t.color, u.shape) for t in things for u in things]
        half = [(t.color, shape) for t in things for shape in SHAPES]
        half += [(color, t.shape) for t in things for color in sorted(COLORS)]
        every = [(color, shape) for color in sorted(COLORS) for shape in SHAPES]
        for pool in rng.choice(((near, half, every), (half, every), (every,))):
            left = [pair for pair in pool if pair not in pairs]
            if left:
                return *rng.choice(left), []
    thing = rng.choice(things)
    same = [t for t in things if (t.color, t.shape) == (thing.color, thing.shape)]
    return thing.color, thing.shape, same


def ask_where_cs(scene: Scene, rng: random.Random) -> QA | None:
    color, shape, found = _some_pair(scene, rng, 0.12)
    if len(found) > 1:
        return None
    place = "in the " + found[0].place if found else NOT_THERE
    thing = f"{color} {shape}"
    answer = f"The {thing}| is {place}."
    words = [ground(found)]
    return _make("where_cs", f"where {thing}", rng, answer, words, "where", thing=thing)


def ask_count_all(scene: Scene, rng: random.Random) -> QA | None:
    number = len(scene.things)
    answer = f"The number of shapes| is {NUMBERS[number]}."
    return _make("count_all", "count", rng, answer, [ground(scene.things, number)])


def ask_count_color(scene: Scene, rng: random.Random) -> QA | None:
    present = sorted({t.color for t in scene.things})
    if not present or rng.random() < 0.2:
        color = _absent(rng, sorted(COLORS), set(present))
    else:
        color = rng.choice(present)
    if color is None:
        return None
    found = [t for t in scene.things if t.color == color]
    answer = f"The number of {color}| shapes is {NUMBERS[len(found)]}."
    words = [ground(found, len(found))]
    return _make("count_color", f"count {color}", rng, answer, words, color=color)


def ask_count_shape(scene: Scene, rng: random.Random) -> QA | None:
    present = sorted({t.shape for t in scene.things})
    if not present or rng.random() < 0.2:
        shape = _absent(rng, SHAPES, set(present))
    else:
        shape = rng.choice(present)
    if shape is None:
        return None
    found = [t for t in scene.things if t.shape == shape]
    answer = f"The number of {plural(shape)}| is {NUMBERS[len(found)]}."
    words = [ground(found, len(found))]
    return _make("count_shape", f"count {shape}", rng, answer, words, shapes=plural(shape))


def ask_at(scene: Scene, rng: random.Random) -> QA | None:
    if scene.bars:
        return None
    cells = {(t.row, t.column): t for t in scene.things}
    empty = [divmod(i, 3) for i in range(9) if divmod(i, 3) not in cells]
    row, column = rng.choice(empty if rng.random() < 0.25 else sorted(cells))
    place = place_name(row, column)
    thing = cells.get((row, column))
    what = f"a {thing.size} {thing.color} {thing.shape}" if thing else ABSENT
    return _make(
        "at",
        f"at {place}",
        rng,
        f"In the {place}| is {what}.",
        [ground([thing] if thing else [])],
        place=_place_asked(row, column, rng),
    )


def _place_asked(row: int, column: int, rng: random.Random) -> str:
    """A cell as people name it: "centre" is also spelt "center", or called "middle"."""
    if row == column == 1:
        return rng.choice(("centre", "centre", "center", "middle"))
    name = place_name(row, column)
    if row == 1:
        return name.replace("middle", rng.choice(("middle", "middle", "centre", "center")))
    return name.replace("centre", rng.choice(("centre", "centre", "center", "middle")))


def ask_yesno(scene: Scene, rng: random.Random) -> QA | None:
    what = rng.random()
    if what < 0.6:
        color, shape, found = _some_pair(scene, rng, 0.5)
        key = f"{color} {shape}"
    elif what < 0.75:
        wanted = set(t.shape for t in scene.things)
        absent = _absent(rng, SHAPES, wanted) if rng.random() < 0.5 or not wanted else None
        key = absent or rng.choice(sorted(wanted))
        found = [t for t in scene.things if t.shape == key]
    elif what < 0.85:
        if not scene.things:
            return None
        t = rng.choice(scene.things)
        size = rng.choice(SIZES)
        key = f"{size} {t.color} {t.shape}"
        found = [u for u in scene.things if (u.size, u.color, u.shape) == (size, t.color, t.shape)]
    else:
        wanted = set(t.color for t in scene.things)
        absent = _absent(rng, sorted(COLORS), wanted) if rng.random() < 0.5 or not wanted else None
        key = absent or rng.choice(sorted(wanted))
        found = [t for t in scene.things if t.color == key]
        answer = f"{article(key).capitalize()}| shape? {'Yes' if found else 'No'}."
        words = [ground(found)]
        return _make(
            "yesno",
            f"is {key}",
            rng,
            answer,
            words,
            "yesno_color",
            color=key,
            a_color=article(key),
        )
    answer = f"{article(key).capitalize()}|? {'Yes' if found else 'No'}."
    return _make("yesno", f"is {key}", rng, answer, [ground(found)], a_thing=article(key))


def ask_size(scene: Scene, rng: random.Random) -> QA | None:
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    same = [t for t in scene.things if t.shape == thing.shape]
    key = thing.shape
    if len(same) > 1 or rng.random() < 0.5:
        key = f"{thing.color} {thing.shape}"
        same = [t for t in same if t.color == thing.color]
    if len(same) > 1:
        return None
    answer = f"The {key}| is {thing.size}."
    return _make("size", f"size {key}", rng, answer, [ground(same)], thing=key)


def ask_bar_value(scene: Scene, rng: random.Random) -> QA | None:
    present = {bar.color: bar for bar in scene.bars}
    if not present or rng.random() < 0.1:
        color = _absent(rng, sorted(COLORS), set(present))
    else:
        color = rng.choice(sorted(present))
    if color is None:
        return None
    found = [present[color]] if color in present else []
    value = f"at {NUMBERS[found[0].height]}" if found else NOT_THERE
    answer = f"The {color}| bar is {value}."
    return _make("bar_value", f"bar {color}", rng, answer, [ground(found)], color=color)


def ask_bars_count(scene: Scene, rng: random.Random) -> QA | None:
    number = len(scene.bars)
    answer = f"The number of bars| is {NUMBERS[number]}."
    return _make("bars_count", "count bars", rng, answer, [ground(scene.bars, number)])


def ask_bar_extreme(scene: Scene, rng: random.Random) -> QA | None:
    word, pick = rng.choice((("tallest", max), ("shortest", min)))
    if not scene.bars:
        return None
    limit = pick(bar.height for bar in scene.bars)
    found = [bar for bar in scene.bars if bar.height == limit]
    if len(found) > 1:
        return None
    answer = f"The {word}| bar is {found[0].color}."
    return _make("bar_extreme", f"bar {word}", rng, answer, [ground(found)], extreme=word)


def ask_type(scene: Scene, rng: random.Random) -> QA | None:
    answer = f"A bar chart|? {'Yes' if scene.bars else 'No'}."
    words = [{"bar": 1.0} if scene.bars else {ABSENT: 1.0}]
    return _make("type", "type", rng, answer, words)


def ask_describe(scene: Scene, rng: random.Random) -> QA | None:
    """Everything in order. Here a mark also stands where the next item has to be found: behind the
    question, and behind each item."""
    items = scene.things or scene.bars
    refers = [ground([item]) for item in items]
    after = [*refers, ground([])]
    if scene.bars:
        # Of the next bar the colour comes first.
        after = [_colour_first(words, bar) for words, bar in zip(after, scene.bars, strict=False)]
        after.append(ground([]))
        parts = [f" {bar.color}| {NUMBERS[bar.height]}" for bar in scene.bars]
        answer = f"A bar chart:|{',|'.join(parts)}.|"
        marks = [after[0]]
    else:
        parts = [f"{t.place.capitalize()}|: a {t.size} {t.color} {t.shape}.|" for t in scene.things]
        answer = " ".join(parts)
        marks = []
    for here, then in zip(refers, after[1:], strict=True):
        marks += [here, then]
    return _make("describe", "describe", rng, answer, marks, asked=after[:1])


def _colour_first(words: dict[str, float], bar: Bar) -> dict[str, float]:
    return {bar.color: words[NUMBERS[bar.height]], NUMBERS[bar.height]: words[bar.color]}


def ask_outside(scene: Scene, rng: random.Random) -> QA | None:
    question = rng.choice(OUTSIDE_ASKS)
    return QA("outside", question, question, OUTSIDE)


Asker = Callable[[Scene, random.Random], QA | None]
ASKERS: dict[str, Asker] = {
    name.removeprefix("ask_"): function
    for name, function in sorted(globals().items())
    if name.startswith("ask_")
}
# How often each kind is practised, in scenes of shapes and in bar charts.
SHAPES_MIX = {
    "shape": 1.0,
    "color": 1.2,
    "count_all": 0.6,
    "count_color": 1.3,
    "count_shape": 1.6,
    "at": 1.3,
    "where": 1.2,
    "where_cs": 1.3,
    "yesno": 1.6,
    "size": 0.5,
    "type": 0.1,
    "bars_count": 0.08,
    "bar_value": 0.08,
}
BARS_MIX = {
    "bar_value": 3.0,
    "bars_count": 0.7,
    "bar_extreme": 1.2,
    "type": 0.2,
    "shape": 0.1,
    "color": 0.1,
    "count_all": 0.1,
    "count_color": 0.15,
    "count_shape": 0.15,
    "where": 0.1,
    "where_cs": 0.1,
    "yesno": 0.25,
}


def ask_one(kind: str, scene: Scene, salt: str = "") -> QA | None:
    """The scene's question of one kind, or None where it has no question with one answer."""
    return ASKERS[kind](scene, random.Random(f"{kind} {scene.seed} {salt}"))


def ask_many(scene: Scene, count: int, salt: str = "", weights: dict | None = None) -> list[QA]:
    """`count` different questions about a scene, drawn by how often each kind is practised."""
    rng = random.Random(f"questions {scene.seed} {salt}")
    mix = weights or (BARS_MIX if scene.bars else SHAPES_MIX)
    kinds, shares = list(mix), list(mix.values())
    found: dict[str, QA] = {}
    for _ in range(40 * count):
        qa = ASKERS[rng.choices(kinds, shares)[0]](scene, rng)
        if qa is not None:
            found.setdefault(qa.ask, qa)
        if len(found) == count:
            break
    return list(found.values())
