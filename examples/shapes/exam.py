"""The held-out examination: which questions are asked, and what a blind guesser would say."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from examples.shapes.questions import QA, SCORED, ask_many, ask_one
from examples.shapes.world import Scene, make_scene, seeds

EXTRA = ("size", "bars_count", "bar_extreme", "describe")
BAR_VALUES = 3  # bars asked about in one chart
BLIND_SCENES = 15_000


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share."""
    if not asked:
        return 0.0, 1.0
    p, zz = right / asked, z * z / asked
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / asked + zz / asked / 4)
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def exam(scene: Scene, salt: str = "exam") -> list[QA]:
    """One question of each kind that has one; of a bar chart, several bars' values."""
    if scene.bars:
        kinds = ("bars_count", "bar_extreme", "describe")
        found = ask_many(scene, BAR_VALUES, salt, {"bar_value": 1.0})
    else:
        kinds = (*(kind for kind in SCORED if kind != "bar_value"), "size", "describe")
        found = []
    return found + [qa for kind in kinds if (qa := ask_one(kind, scene, salt)) is not None]


def take(split: str, shapes: int) -> list[Scene]:
    """The split's first scenes, up to the `shapes`-th one of shapes; the charts come with them."""
    found, count = [], 0
    for seed in seeds(split):
        found.append(make_scene(seed))
        count += not found[-1].bars
        if count >= shapes:
            break
    return found


def blind_guesses(count: int = BLIND_SCENES) -> dict[str, str]:
    """The most frequent answer to each question, phrasing aside, over training scenes."""
    answers: dict[str, Counter] = defaultdict(Counter)
    source = seeds("train", 900_000_000)
    for _ in range(count):
        for qa in exam(make_scene(next(source)), "blind"):
            answers[qa.ask][qa.answer] += 1
    return {ask: counts.most_common(1)[0][0] for ask, counts in answers.items()}
