"""Questions about bar charts."""

from __future__ import annotations

import random

from examples.shapes.phrases import ABSENT, NOT_THERE
from examples.shapes.qa import QA, ground, make, some
from examples.shapes.world import COLORS, NUMBERS, Scene


def ask_bar_value(scene: Scene, rng: random.Random) -> QA | None:
    present = {bar.color: bar for bar in scene.bars}
    color = some(rng, sorted(COLORS), present, 0.1)
    if color is None:
        return None
    found = [present[color]] if color in present else []
    value = f"at {NUMBERS[found[0].height]}" if found else NOT_THERE
    answer = f"The {color}| bar is {value}."
    return make("bar_value", f"bar {color}", rng, answer, [ground(found)], color=color)


def ask_bars_count(scene: Scene, rng: random.Random) -> QA | None:
    number = len(scene.bars)
    answer = f"The number of bars| is {NUMBERS[number]}."
    return make("bars_count", "count bars", rng, answer, [ground(scene.bars, number)])


def ask_bar_extreme(scene: Scene, rng: random.Random) -> QA | None:
    word, pick = rng.choice((("tallest", max), ("shortest", min)))
    if not scene.bars:
        return None
    limit = pick(bar.height for bar in scene.bars)
    found = [bar for bar in scene.bars if bar.height == limit]
    if len(found) > 1:
        return None
    answer = f"The {word}| bar is {found[0].color}."
    return make("bar_extreme", f"bar {word}", rng, answer, [ground(found)], extreme=word)


def ask_type(scene: Scene, rng: random.Random) -> QA | None:
    answer = f"A bar chart|? {'Yes' if scene.bars else 'No'}."
    words = [{"bar": 1.0} if scene.bars else {ABSENT: 1.0}]
    return make("type", "type", rng, answer, words)
