"""All kinds of questions about a scene, and how often each is practised.

Only questions with one right answer are asked. Every answer restates the key before the word that
has to be looked up ("The circle is red.", "In the top left is nothing."), so that a small model
finds the thing first and then reads it off. About a picture with nothing drawn in it every question
has the same answer: that only drawn scenes are known.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from examples.shapes import charts, prints, relations, things
from examples.shapes.phrases import OUTSIDE, OUTSIDE_ASKS
from examples.shapes.qa import QA, Words, ground, make
from examples.shapes.world import NUMBERS, Bar, Scene, make_scene


def ask_describe(scene: Scene, rng: random.Random) -> QA | None:
    """Everything in order. The next item is to be found at the end of the question, and behind each
    item."""
    items = scene.bars or scene.items
    refers = [ground([item]) for item in items]
    after = [*refers, ground([])]
    if scene.bars:
        # Of the next bar the colour comes first.
        after = [_colour_first(words, bar) for words, bar in zip(after, scene.bars, strict=False)]
        after.append(ground([]))
        parts = [f" {bar.color}| {NUMBERS[bar.height]}" for bar in scene.bars]
        answer = f"A bar chart:^{',^'.join(parts)}.^"
        marks = [after[0]]
    else:
        parts = [f"{i.place.capitalize()}|: {things.short(i)}.^" for i in scene.items]
        answer = " ".join(parts)
        marks = []
    for here, then in zip(refers, after[1:], strict=True):
        marks += [here, then]
    return make("describe", "describe", rng, answer, marks, asked=after[:1])


def _colour_first(words: Words, bar: Bar) -> Words:
    return {bar.color: words[NUMBERS[bar.height]], NUMBERS[bar.height]: words[bar.color]}


def ask_outside(scene: Scene, rng: random.Random) -> QA | None:
    question = rng.choice(OUTSIDE_ASKS)
    return QA("outside", question, question, OUTSIDE)


Asker = Callable[[Scene, random.Random], QA | None]
ASKERS: dict[str, Asker] = {
    **{
        name.removeprefix("ask_"): function
        for module in (things, relations, prints, charts)
        for name, function in sorted(vars(module).items())
        if name.startswith("ask_")
    },
    "describe": ask_describe,
    "outside": ask_outside,
}
# Kinds that score the model, each by the whole answer; boxes are scored by their overlap.
SCORED = (
    "shape color size largest count_all count_color count_shape at where where_cs relation next "
    "yesno number word text bar_value bar_extreme bars_count describe"
).split()
# How often each kind is practised, by the kind of scene.
MIXES: dict[str, dict[str, float]] = {
    "shapes": {
        "shape": 0.7,
        "color": 0.9,
        "size": 0.7,
        "largest": 0.9,
        "count_all": 1.3,
        "count_color": 2.2,
        "count_shape": 2.4,
        "at": 1.2,
        "where": 0.7,
        "where_cs": 1.0,
        "relation": 2.2,
        "next": 2.6,
        "yesno": 1.4,
        "number": 0.3,
        "word": 0.3,
        "text": 0.3,
        "type": 0.08,
        "bars_count": 0.06,
        "bar_value": 0.06,
    },
    "printed": {
        "number": 1.2,
        "word": 1.2,
        "text": 2.0,
        "where": 0.7,
        "at": 1.0,
        "count_all": 0.1,
        "count_shape": 0.1,
        "count_color": 0.1,
        "shape": 0.1,
        "color": 0.1,
        "yesno": 0.15,
        "type": 0.05,
    },
    "bars": {
        "bar_value": 3.0,
        "bars_count": 1.2,
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
        "number": 0.1,
        "word": 0.1,
        "text": 0.1,
    },
}


def ask_one(kind: str, scene: Scene, salt: str = "") -> QA | None:
    """The scene's question of one kind, or None where it has no question with one answer."""
    rng = random.Random(f"{kind} {scene.seed} {salt}")
    if scene.kind == "texture":
        qa = ASKERS[kind](_other(scene), rng)
        return qa and replace(qa, kind="outside", answer=OUTSIDE, marks=())
    return ASKERS[kind](scene, rng)


def _other(scene: Scene) -> Scene:
    """A scene with something in it, for questions that this one cannot answer."""
    other, at = scene, scene.seed
    while other.kind == "texture":
        at += 1
        other = make_scene(at)
    return other


def ask_many(
    scene: Scene, count: int, salt: str = "", weights: dict[str, float] | None = None
) -> list[QA]:
    """`count` different questions about a scene, drawn by how often each kind is practised."""
    rng = random.Random(f"questions {scene.seed} {salt}")
    source = _other(scene) if scene.kind == "texture" else scene
    mix = weights or MIXES[source.kind]
    kinds, shares = list(mix), list(mix.values())
    found: dict[str, QA] = {}
    for _ in range(40 * count):
        qa = ASKERS[rng.choices(kinds, shares)[0]](source, rng)
        if qa is not None:
            found.setdefault(qa.ask, qa)
        if len(found) == count:
            break
    if source is not scene:
        return [replace(qa, kind="outside", answer=OUTSIDE, marks=()) for qa in found.values()]
    return list(found.values())
