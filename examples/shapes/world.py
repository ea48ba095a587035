"""The drawn world: a scene is a function of its seed, and nothing else.

    "shapes"  1 to 5 things, each in its own cell of a 3 x 3 grid, on light paper
    "bars"    a bar chart: 2 to 5 coloured bars of whole heights over a grid of lines

Every attribute is one word (`Thing.words`, `Bar.words`). Nothing here depends on hash order or
on the clock. `drawing` makes the pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SIZE = 96
PATCH = 16
CELL = SIZE // 3

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (222, 38, 38),
    "orange": (250, 140, 16),
    "yellow": (246, 212, 20),
    "green": (36, 160, 66),
    "blue": (38, 88, 222),
    "purple": (134, 54, 178),
    "pink": (250, 138, 190),
    "black": (28, 28, 32),
}
SIZES = ("small", "big")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
PAPERS = (
    (255, 255, 255),
    (250, 246, 235),
    (240, 244, 250),
    (238, 246, 236),
    (248, 238, 240),
    (236, 236, 236),
    (252, 250, 222),
)
MAX_THINGS = 5
MAX_HEIGHT = 8
BARS_SHARE = 0.23

# Seeds of one split never meet another's: [start, start + SPAN).
SPAN = 1_000_000_000
SPLITS = {"train": 0, "progress": SPAN, "heldout": 2 * SPAN}


def place_words(row: int, column: int) -> tuple[str, str]:
    """A cell's row and column. No word serves for both: a model would mix them up."""
    return (ROWS[row], COLUMNS[column])


def place_name(row: int, column: int) -> str:
    """What answers call a cell: "top left", ..., "middle right", and plain "centre"."""
    return "centre" if row == column == 1 else " ".join(place_words(row, column))


@dataclass(frozen=True)
class Thing:
    """One shape; x, y, radius in pixels of the finished picture, turn in radians."""

    size: str
    color: str
    shape: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        return place_name(self.row, self.column)

    @property
    def words(self) -> tuple[str, ...]:
        return (self.size, self.color, self.shape, *place_words(self.row, self.column))


@dataclass(frozen=True)
class Bar:
    """One bar; left, width in pixels, height in units of the chart."""

    color: str
    height: int
    left: float
    width: float
    rgb: tuple[int, int, int]

    @property
    def words(self) -> tuple[str, ...]:
        return ("bar", self.color, NUMBERS[self.height])


@dataclass(frozen=True)
class Scene:
    """Either `things` (row by row) or `bars` (left to right); the other is empty."""

    seed: int
    paper: tuple[int, int, int]
    things: tuple[Thing, ...] = ()
    bars: tuple[Bar, ...] = ()


def seeds(split: str, start: int = 0) -> Iterator[int]:
    """The split's seeds from its `start`-th on."""
    if not 0 <= start < SPAN:
        raise ValueError(f"start (={start}) must lie in [0, {SPAN}).")
    return iter(range(SPLITS[split] + start, SPLITS[split] + SPAN))


def make_scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = random.Random(f"scene {seed}")
    paper = rng.choice(PAPERS)
    if rng.random() < BARS_SHARE:
        return Scene(seed, paper, bars=_bars(rng))
    return Scene(seed, paper, things=_things(rng))


def _rgb(rng: random.Random, color: str) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color])
    return (r, g, b)


def _things(rng: random.Random) -> tuple[Thing, ...]:
    cells = rng.sample(range(9), rng.randint(1, MAX_THINGS))
    # Often few colours or few shapes, so that things share attributes and counts pass one.
    colors = rng.sample(sorted(COLORS), rng.choice((2, 3, 8, 8)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 6, 6)))
    things = []
    for cell in sorted(cells):
        size, color, shape = rng.choice(SIZES), rng.choice(colors), rng.choice(shapes)
        radius = rng.uniform(7.0, 8.6) if size == "small" else rng.uniform(11.6, 13.6)
        free = min(CELL / 2 - radius, 5.0)
        row, column = divmod(cell, 3)
        x = (column + 0.5) * CELL + rng.uniform(-free, free)
        y = (row + 0.5) * CELL + rng.uniform(-free, free)
        turn = rng.uniform(-0.15, 0.15)
        things.append(Thing(size, color, shape, row, column, x, y, radius, turn, _rgb(rng, color)))
    return tuple(things)


def _bars(rng: random.Random) -> tuple[Bar, ...]:
    colors = rng.sample(sorted(COLORS), rng.randint(2, 5))
    step = 84 / len(colors)
    width = min(step * rng.uniform(0.55, 0.8), 22)
    return tuple(
        Bar(
            color,
            rng.randint(1, MAX_HEIGHT),
            9 + step * i + (step - width) / 2,
            width,
            _rgb(rng, color),
        )
        for i, color in enumerate(colors)
    )
