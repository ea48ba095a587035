"""Wide pictures of three shapes in a row, captions of them, and questions about their ends.

    python -m examples.llava_stages.rows --out DIR [--count 600] [--held-out 100]

captions.jsonl is what LLaVA's first stage reads, chats.jsonl what its second does; held-out.jsonl
has questions about pictures that neither shows. A crop to the middle square loses both ends.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f5fd0", "yellow": "#e8c500"}
SHAPES = ("circle", "square", "triangle")
PLACES = ("left", "middle", "right")
SIDE = 96
# As wide as three squares: a crop keeps the middle one.
SIZE = (3 * SIDE, SIDE)
Thing = tuple[str, str]


def draw(things: list[Thing], place: random.Random) -> Image.Image:
    """One thing in each third, left to right."""
    image = Image.new("RGB", SIZE, "#f4f4f0")
    pen = ImageDraw.Draw(image)
    for number, (color, shape) in enumerate(things):
        r = place.uniform(0.3, 0.4) * SIDE
        x = SIDE * (number + 0.5)
        y = place.uniform(r + 4, SIDE - r - 4)
        box = (x - r, y - r, x + r, y + r)
        if shape == "circle":
            pen.ellipse(box, COLORS[color])
        elif shape == "square":
            pen.rectangle(box, COLORS[color])
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], COLORS[color])
    return image


def caption(things: list[Thing]) -> str:
    first, second, third = (f"a {color} {shape}" for color, shape in things)
    return f"{first}, {second} and {third}"


def chat(image: str, things: list[Thing], order: random.Random) -> dict[str, Any]:
    """Every place is asked for once; the picture belongs to the first question."""
    messages = []
    for place in order.sample(PLACES, len(PLACES)):
        color, shape = things[PLACES.index(place)]
        messages += [
            {"role": "user", "content": f"What is on the {place}?"},
            {"role": "assistant", "content": f"A {color} {shape}."},
        ]
    return {"image": image, "messages": messages}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=100)
    options = parser.parse_args()
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    captions, chats, held = [], [], []
    for number in range(options.count + options.held_out):
        things = [(dice.choice(list(COLORS)), dice.choice(SHAPES)) for _ in PLACES]
        name = f"images/{number:04}.png"
        draw(things, dice).save(options.out / name)
        row = chat(name, things, dice)
        if number >= options.count:
            held.append(row)
            continue
        chats.append(row)
        said = {"role": "assistant", "content": caption(things)}
        question = {"role": "user", "content": "Describe the picture."}
        captions.append({"image": name, "messages": [question, said]})
    write(options.out / "captions.jsonl", captions)
    write(options.out / "chats.jsonl", chats)
    write(options.out / "held-out.jsonl", held)


if __name__ == "__main__":
    main()
