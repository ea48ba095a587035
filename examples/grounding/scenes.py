"""Pictures of one thing or two, and what is asked about where they are.

    Where is the red star? Box it.           red star: [360,120,600,400]
    Where is the red star? Point to it.      red star: [480,240]
    What is at [480,240]?                    red star
    What is in [360,120,600,400]?            red star

Coordinates are thousandths of the picture's sides, x before y, in steps of 40: each is one token of
the small vocabulary, and 25 are learnt faster than a thousand. Things, drawing and words are the
drawn world's (`examples.shapes`).

    python -m examples.grounding.scenes --out runs/grounding/data
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from examples.shapes.drawing import box, draw
from examples.shapes.world import COLORS, PAPERS, SHAPES, SIZE, Box, Scene, Thing

# Words that the questions have and the drawn world's vocabulary lacks.
WORDS = ("Where", "Box", "Point", "What", "it", "to", "at", "in", "is", "the")
RADII = (8.0, 13.0)
TIMES = 2  # as large as the drawn world's pictures: a tile is as large as one of those
STEP = 40
HELD_OUT = 1_000_000  # seeds from here on are never trained on
TILES = 2  # a side of the static grid
CELLS = 4  # a side of a view's visual tokens


def make(seed: int) -> Scene:
    """The scene of a seed: one thing, or two of different colours that do not touch."""
    rng = random.Random(f"grounding {seed}")
    things: list[Thing] = []
    for color in rng.sample(sorted(COLORS), rng.choice((1, 2))):
        radius = rng.uniform(*RADII)
        for _ in range(100):
            reach = 1.1 * radius
            x, y = (rng.uniform(reach + 1, SIZE - reach - 1) for _ in "xy")
            near = (abs(x - t.x) < reach + t.reach[0] + 2 for t in things)
            beside = (abs(y - t.y) < reach + t.reach[0] + 2 for t in things)
            if not any(a and b for a, b in zip(near, beside, strict=True)):
                turn, shape = rng.uniform(-0.15, 0.15), rng.choice(SHAPES)
                things.append(Thing(color, COLORS[color], x, y, "big", shape, radius, turn))
                break
    return Scene(seed, rng.choice(PAPERS[:6]), things=tuple(things))


def picture(scene: Scene) -> Image.Image:
    """192 x 192 pixels: four tiles of 96."""
    return draw(scene, TIMES)


def name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def corners(thing: Thing) -> list[int]:
    """x0, y0, x1, y1 in thousandths, in steps."""
    return [_stepped(edge) for edge in exactly(thing)]


def exactly(thing: Thing) -> Box:
    """The same to the thousandth."""
    x0, y0, x1, y1 = (1000 * edge / SIZE for edge in box(thing))
    return x0, y0, x1, y1


def middle(thing: Thing) -> list[int]:
    left, top, right, bottom = exactly(thing)
    return [_stepped((left + right) / 2), _stepped((top + bottom) / 2)]


def written(numbers: list[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def questions(thing: Thing) -> list[tuple[str, str]]:
    """(question, answer) in the order of the table above."""
    where, called = f"Where is the {name(thing)}?", name(thing)
    at, inside = written(middle(thing)), written(corners(thing))
    return [
        (f"{where} Box it.", f"{called}: {inside}"),
        (f"{where} Point to it.", f"{called}: {at}"),
        (f"What is at {at}?", called),
        (f"What is in {inside}?", called),
    ]


def rows(scene: Scene, image: str) -> list[dict[str, Any]]:
    """A row for each question. `align` says which words each visual token shows, and `ground` where
    the thing lies that a question's key word refers to."""
    shown = [
        {"image": 0, "token": token, "words": words}
        for token, words in enumerate(visible(scene))
        if words
    ]
    found = []
    for thing in scene.things:
        for question, answer in questions(thing):
            turns = [{"role": "user", "content": question}]
            turns.append({"role": "assistant", "content": answer})
            marks: dict[str, Any] = {"align": [] if found else shown}  # once: its rows share it
            if (end := question.find(thing.shape) + len(thing.shape)) >= len(thing.shape):
                at = {str(v): 1.0 for v in corners(thing)}
                marks["ground"] = [{"turn": 0, "end": end, "words": at}]
            found.append({"image": image, "messages": turns, "targets": marks})
    return found


def visible(scene: Scene) -> list[dict[str, float]]:
    """Words of what each visual token shows, tiles row after row and then the whole, with masses;
    empty where there is paper."""
    tile, out = SIZE / TILES, []
    views = [(c * tile, r * tile, tile) for r in range(TILES) for c in range(TILES)]
    for left, top, side in [*views, (0.0, 0.0, float(SIZE))]:
        step = side / CELLS
        for row in range(CELLS):
            for column in range(CELLS):
                x, y = left + column * step, top + row * step
                out.append(_words(scene, (x, y, x + step, y + step), side == SIZE))
    return out


def _stepped(place: float) -> int:
    return min(max(round(place / STEP), 0), 1000 // STEP - 1) * STEP


def _words(scene: Scene, cell: Box, whole: bool) -> dict[str, float]:
    """Colour and shape; of the whole, where a cell's place is known, the edges as well."""
    area = (cell[2] - cell[0]) * (cell[3] - cell[1])
    shares = [(_meeting(box(thing), cell) / area, thing) for thing in scene.things]
    share, thing = max(shares, key=lambda pair: pair[0])
    if share < 0.2:
        return {}
    words = {thing.color: 1.0, thing.shape: 1.0}
    for edge in corners(thing) if whole else ():
        words[str(edge)] = words.get(str(edge), 0.0) + 0.5
    return words


def _meeting(a: Box, b: Box) -> float:
    """Area that two boxes have in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 to 1."""
    both = _meeting(a, b)
    areas = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return both / (sum(areas) - both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1500)
    args = parser.parse_args()
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    with (args.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for seed in range(args.pictures):
            scene = make(seed)
            picture(scene).save(images / f"{seed:05}.png")
            for row in rows(scene, f"{seed:05}.png"):
                file.write(json.dumps(row) + "\n")
    print(f"{args.out}: {args.pictures} pictures")


if __name__ == "__main__":
    main()
