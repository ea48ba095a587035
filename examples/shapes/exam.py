"""The held-out examination: which questions are asked, and what a blind guesser would say."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from examples.shapes.qa import QA
from examples.shapes.questions import SCORED, ask_one
from examples.shapes.world import Scene, make_scene, seeds

BLIND_SCENES = 15_000


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share."""
    if not asked:
        return 0.0, 1.0
    p, zz = right / asked, z * z / asked
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / asked + zz / asked / 4)
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def asks(scene: Scene, kind: str) -> bool:
    """Whether scenes of this sort are examined in a kind: nobody asks for bars where none are."""
    if kind in ("bar_value", "bars_count", "bar_extreme"):
        return scene.kind == "bars"
    if kind in ("number", "word", "text"):
        return bool(scene.prints)
    if kind in ("describe", "outside"):
        return scene.kind != "texture" or kind == "outside"
    return scene.kind == "shapes" or (kind == "at" and scene.kind == "printed")


def exam(scene: Scene, kinds: Sequence[str] = (*SCORED, "box"), salt: str = "exam") -> list[QA]:
    """One question of each kind that the scene has one of."""
    found = [ask_one(kind, scene, salt) for kind in kinds if asks(scene, kind)]
    return [qa for qa in found if qa is not None]


def take(
    split: str,
    each: int,
    kinds: Sequence[str] = (*SCORED, "box"),
    keep: Callable[[Scene, QA], bool] = lambda scene, qa: True,
) -> list[tuple[Scene, QA]]:
    """`each` questions of every kind about the split's first scenes, no two of a kind about one.

    keep: which of the questions count.
    """
    missing = dict.fromkeys(kinds, each)
    found = []
    for seed in seeds(split):
        left = [kind for kind, count in missing.items() if count]
        if not left:
            return found
        scene = make_scene(seed)
        for qa in exam(scene, left):
            if not keep(scene, qa):
                continue
            missing[qa.kind] -= 1
            found.append((scene, qa))
    return found


def blind_guesses(count: int = BLIND_SCENES) -> dict[str, str]:
    """The most frequent answer to each question, phrasing aside, over training scenes."""
    answers: dict[str, Counter] = defaultdict(Counter)
    source = seeds("train", 900_000_000)
    for _ in range(count):
        for qa in exam(make_scene(next(source)), salt="blind"):
            answers[qa.ask][qa.answer] += 1
    return {ask: counts.most_common(1)[0][0] for ask, counts in answers.items()}
