"""Scenes to pictures of 96 x 96, and which words each 16 x 16 patch of a picture shows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from examples.shapes.world import MAX_HEIGHT, PATCH, SIZE, Bar, Scene, Thing

SCALE = 2  # pictures are drawn at twice their size and averaged down
BASE = 91  # the chart's ground line, in pixels from the top
UNIT = 10.5  # pixels per unit of height
# pictures/NAME.png: held-out scenes to talk about, drawn four times as large.
SAMPLES = {"scene": 2_400_000_027, "chart": 2_400_000_020}


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a shape around (0, 0), within a circle of radius about 1."""
    if thing.shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if thing.shape == "triangle":
        return [(0, -1.0), (0.98, 0.82), (-0.98, 0.82)]
    if thing.shape == "star":
        spokes = [(1.08 if i % 2 == 0 else 0.46, math.pi * i / 5) for i in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for r, a in spokes]
    if thing.shape == "cross":
        a, b = 0.32, 1.0
        quarter = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return quarter + [(-x, -y) for x, y in quarter]
    if thing.shape == "heart":
        angles = [2 * math.pi * i / 28 for i in range(28)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 16
                - 0.05,
            )
            for t in angles
        ]
    raise ValueError(f"no outline for shape {thing.shape!r}.")


def _paint(draw: ImageDraw.ImageDraw, item: Thing | Bar, fill: object, scale: int) -> None:
    if isinstance(item, Bar):
        x0, x1 = item.left * scale, (item.left + item.width) * scale
        y0 = (BASE - item.height * UNIT) * scale
        draw.rectangle((x0, y0, x1 - 1, BASE * scale - 1), fill=fill)  # type: ignore[arg-type]
        return
    x, y, r = item.x * scale, item.y * scale, item.radius * scale
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)  # type: ignore[arg-type]
        return
    c, s = math.cos(item.turn), math.sin(item.turn)
    corners = [(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in _outline(item)]
    draw.polygon(corners, fill=fill)  # type: ignore[arg-type]


def draw(scene: Scene, times: int = 1) -> Image.Image:
    """The scene as an RGB picture of 96 x 96, or `times` as large."""
    scale = SCALE * times
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), scene.paper)
    pen = ImageDraw.Draw(image)
    if scene.bars:
        faint = tuple(c - 26 for c in scene.paper)
        for unit in range(1, MAX_HEIGHT + 1):
            y = (BASE - unit * UNIT) * scale
            pen.line((6 * scale, y, 94 * scale, y), fill=faint, width=times)
    for item in scene.things or scene.bars:
        _paint(pen, item, item.rgb, scale)
    if scene.bars:
        dark = (70, 70, 70)
        pen.line((6 * scale, 3 * scale, 6 * scale, BASE * scale), fill=dark, width=scale)
        pen.line((6 * scale, BASE * scale, 94 * scale, BASE * scale), fill=dark, width=scale)
    return image.reduce(SCALE)


def patch_words(scene: Scene, least: int = 20) -> list[tuple[str, ...]]:
    """For each patch, row by row: the words of the item that covers most of it.

    An item must cover `least` of the patch's 256 pixels; else the tuple is empty.
    """
    items = scene.things or scene.bars
    canvas = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(canvas)
    for i, item in enumerate(items):
        _paint(pen, item, i + 1, 1)
    side = SIZE // PATCH
    cells = np.asarray(canvas).reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3)
    found = []
    for cell in cells.reshape(side * side, -1):
        count = np.bincount(cell, minlength=len(items) + 1)[1:]
        best = int(count.argmax())
        found.append(items[best].words if count[best] >= least else ())
    return found
