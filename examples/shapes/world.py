"""The drawn world: a scene is a function of its seed, and nothing else.

    "shapes"   1 to 5 things anywhere on the paper, in some of them also something printed
    "printed"  1 to 3 printed numbers or words
    "bars"     a bar chart: 2 to 5 coloured bars of whole heights over a grid of lines
    "texture"  nothing drawn: blobs, gradients and grain, as photographs have them

Things stand anywhere, and prints anywhere on lines `LINE` pixels apart, but each in its own ninth
of the picture, so that "top left" means one of them, and never within `MARGIN` pixels of the border
between two ninths.
Every attribute is one word (`words`). Nothing here depends on hash order or on the clock.
`drawing` makes the pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SIZE = 96
PATCH = 12
CELL = SIZE // 3
MARGIN = 3.0

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
INKS = tuple(color for color in COLORS if color != "yellow")  # yellow letters cannot be read
RADII = {"small": (6.0, 6.8), "medium": (8.4, 9.4), "big": (11.4, 13.2)}
SIZES = tuple(RADII)
PRINT_HEIGHTS = (10.4, 11.6)  # of capitals and digits, in pixels
LINE = 12  # print stands on lines so far apart, each about the middle of one
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
WORDS = tuple(
    "ART BAG BIKE BOOK BOX BUS CAKE CAR CAT COW CUP DOG DOOR EGG EXIT FISH FROG GIFT HAT HELP "
    "HOME ICE JAM KEY LAMP LION MAP MILK MOON OPEN PARK PEN PIE PUSH RAIN SALE SHIP STOP SUN TAXI "
    "TEA TREE WAY WOLF YES ZOO".split()
)
PRINTED_NUMBERS = range(100)
# A character's width in units of its height, in the typeface that Pillow brings.
WIDTHS = dict.fromkeys("CDGHNOU", 1.05) | {"M": 1.26, "W": 1.38, "I": 0.4}
USUAL_WIDTH = 0.92
PAPERS = (
    (255, 255, 255),
    (250, 246, 235),
    (240, 244, 250),
    (238, 246, 236),
    (248, 238, 240),
    (236, 236, 236),
    (252, 250, 222),
    (214, 214, 212),
    (206, 196, 178),
)
PATTERNS = ("plain", "plain", "plain", "lined", "squared", "shaded")
MAX_THINGS = 5
MAX_PRINTS = 3
MAX_HEIGHT = 8
SHARES = {"texture": 0.04, "bars": 0.2, "printed": 0.16, "shapes": 0.6}
PRINT_BESIDE_SHAPES = 0.35

# Seeds of one split never meet another's: [start, start + SPAN).
SPAN = 1_000_000_000
SPLITS = {"train": 0, "progress": SPAN, "heldout": 2 * SPAN}

Box = tuple[float, float, float, float]


def place_words(row: int, column: int) -> tuple[str, str]:
    """A ninth's row and column. No word serves for both: a model would mix them up."""
    return (ROWS[row], COLUMNS[column])


def place_name(row: int, column: int) -> str:
    """What answers call a ninth: "top left", ..., "middle right", and plain "centre"."""
    return "centre" if row == column == 1 else " ".join(place_words(row, column))


@dataclass(frozen=True)
class Item:
    """What stands at (x, y), in pixels of the finished picture, with its colour as drawn."""

    color: str
    rgb: tuple[int, int, int]
    x: float
    y: float

    @property
    def row(self) -> int:
        return int(self.y // CELL)

    @property
    def column(self) -> int:
        return int(self.x // CELL)

    @property
    def place(self) -> str:
        return place_name(self.row, self.column)


@dataclass(frozen=True)
class Thing(Item):
    """One shape; radius in pixels, turn in radians."""

    size: str
    shape: str
    radius: float
    turn: float

    @property
    def words(self) -> tuple[str, ...]:
        return (self.size, self.color, self.shape, *place_words(self.row, self.column))

    @property
    def reach(self) -> tuple[float, float]:
        """Half of the width and of the height that it may take, in pixels."""
        return (1.1 * self.radius, 1.1 * self.radius)


@dataclass(frozen=True)
class Print(Item):
    """A printed number or word; height of its capitals and digits in pixels."""

    text: str
    height: float

    @property
    def kind(self) -> str:
        return "number" if self.text.isdigit() else "word"

    @property
    def words(self) -> tuple[str, ...]:
        return (self.kind, self.text, self.color, *place_words(self.row, self.column))

    @property
    def reach(self) -> tuple[float, float]:
        wide = sum(WIDTHS.get(letter, USUAL_WIDTH) for letter in self.text)
        return (0.5 * self.height * wide + 0.5, 0.5 * self.height + 1)


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
class Look:
    """How a picture is taken: grain in grey levels, light as a factor, JPEG quality or 0: none."""

    pattern: str = "plain"
    grain: float = 0.0
    light: float = 1.0
    jpeg: int = 0


@dataclass(frozen=True)
class Scene:
    """`things` and `prints` in reading order, or `bars` from left to right, or a texture."""

    seed: int
    paper: tuple[int, int, int]
    look: Look = Look()
    things: tuple[Thing, ...] = ()
    prints: tuple[Print, ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def kind(self) -> str:
        if self.bars:
            return "bars"
        if self.things:
            return "shapes"
        return "printed" if self.prints else "texture"

    @property
    def items(self) -> tuple[Thing | Print, ...]:
        """Things and prints in reading order, ninth by ninth."""
        return tuple(sorted((*self.things, *self.prints), key=lambda item: (item.row, item.column)))


def seeds(split: str, start: int = 0) -> Iterator[int]:
    """The split's seeds from its `start`-th on."""
    if not 0 <= start < SPAN:
        raise ValueError(f"start (={start}) must lie in [0, {SPAN}).")
    return iter(range(SPLITS[split] + start, SPLITS[split] + SPAN))


def make_scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = random.Random(f"scene {seed}")
    paper = rng.choice(PAPERS)
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    look = Look(
        rng.choice(PATTERNS) if kind in ("shapes", "printed") else "plain",
        rng.uniform(2.0, 7.0) if rng.random() < 0.25 else 0.0,
        rng.uniform(0.85, 1.06) if rng.random() < 0.25 else 1.0,
        rng.randint(40, 90) if rng.random() < 0.25 else 0,
    )
    if kind == "bars":
        return Scene(seed, paper, look, bars=_bars(rng))
    if kind == "texture":
        return Scene(seed, paper, look)
    wanted: list[Thing | Print] = []
    if kind == "shapes":
        wanted += _things(rng)
    if kind == "printed" or rng.random() < PRINT_BESIDE_SHAPES:
        wanted += make_prints(rng, rng.randint(1, MAX_PRINTS) if kind == "printed" else 1)
    placed = _place(wanted, rng)
    placed.sort(key=lambda item: (item.row, item.column))
    things = tuple(item for item in placed if isinstance(item, Thing))
    prints = tuple(item for item in placed if isinstance(item, Print))
    return Scene(seed, paper, look, things, prints)


def _rgb(rng: random.Random, color: str) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color])
    return (r, g, b)


def _things(rng: random.Random) -> list[Thing]:
    """Things that have no place yet."""
    # Often few colours or few shapes, so that things share attributes and counts pass one.
    colors = rng.sample(sorted(COLORS), rng.choice((2, 3, 8, 8)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 6, 6)))
    things = []
    for _ in range(rng.randint(1, MAX_THINGS)):
        size, color, shape = rng.choice(SIZES), rng.choice(colors), rng.choice(shapes)
        radius, turn = rng.uniform(*RADII[size]), rng.uniform(-0.15, 0.15)
        things.append(Thing(color, _rgb(rng, color), 0, 0, size, shape, radius, turn))
    return things


def make_prints(rng: random.Random, count: int) -> list[Print]:
    """Prints that have no place yet, each of its own colour and text."""
    found = []
    for color in rng.sample(INKS, count):
        text = str(rng.choice(PRINTED_NUMBERS)) if rng.random() < 0.5 else rng.choice(WORDS)
        if text not in [other.text for other in found]:
            found.append(Print(color, _rgb(rng, color), 0, 0, text, rng.uniform(*PRINT_HEIGHTS)))
    return found


def on_line(y: float, rng: random.Random) -> float:
    """The middle of the line that y falls on, give or take half a pixel."""
    return (int(y // LINE) + 0.5) * LINE + rng.uniform(-0.5, 0.5)


def _place(wanted: list[Thing | Print], rng: random.Random) -> list[Thing | Print]:
    """Gives each a place, the largest first; one that finds none in 200 tries is left out."""
    placed: list[Thing | Print] = []
    for item in sorted(wanted, key=lambda item: -item.reach[0]):
        for _ in range(200):
            w, h = item.reach
            x, y = rng.uniform(w + 1, SIZE - w - 1), rng.uniform(h + 1, SIZE - h - 1)
            if isinstance(item, Print):
                y = on_line(y, rng)
            found = type(item)(**{**vars(item), "x": x, "y": y})
            edge = min(abs(v - line) for v in (x, y) for line in (CELL, 2 * CELL))
            if edge >= MARGIN and not any(_meet(found, other) for other in placed):
                placed.append(found)
                break
    return placed


def _meet(a: Thing | Print, b: Thing | Print) -> bool:
    if (a.row, a.column) == (b.row, b.column):
        return True
    (aw, ah), (bw, bh) = a.reach, b.reach
    return abs(a.x - b.x) < aw + bw + 1 and abs(a.y - b.y) < ah + bh + 1


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
