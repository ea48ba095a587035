"""Pictures with nothing drawn in them that the world knows: what the model learns to refuse.

One of several sorts for each seed, made to differ from one another as photographs, scans and
screens do. `photographs` examines with others, and with real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

Noise = np.random.Generator
Point = tuple[float, float]


def picture(seed: int, side: int) -> Image.Image:
    """The seed's picture, side x side, RGB."""
    rng = np.random.default_rng(seed)
    image = SORTS[int(rng.choice(len(SORTS), p=SHARES))](rng, side)
    # Photographs are seldom as colourful as chance is, and some are grey.
    return ImageEnhance.Color(image).enhance(min(1.0, max(0.0, rng.uniform(-0.2, 1.4))))


def smooth(rng: Noise, side: int, cells: tuple[int, ...], depth: int = 3) -> np.ndarray:
    """[side, side, depth] noise around 0, coarse and fine by chance."""
    found = np.zeros((side, side, depth))
    for count in cells:
        # Coarse noise moves the colour, fine noise mostly the light.
        grey = rng.normal(0, 1, (count, count, 1)) + rng.normal(0, 0.4, (count, count, depth))
        layer = np.clip(128 + 40 * grey, 0, 255).astype(np.uint8)
        up = Image.fromarray(layer.squeeze()).resize((side, side), Image.Resampling.BICUBIC)
        strength = rng.uniform(0.1, 1.4)
        found += strength * (np.asarray(up, float).reshape(side, side, depth) - 128)
    return found


def slope(rng: Noise, side: int) -> np.ndarray:
    """[side, side, 3] from one colour to another, at any angle."""
    low, high = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    share = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle), 0, 1)
    return low + (high - low) * share[..., None]


def finished(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def outline(rng: Noise, x: float, y: float, radius: float, rough: float) -> list[Point]:
    """A closed line around (x, y), as round as `rough` is small."""
    turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    reach = np.ones(40)
    for k in range(1, 6):
        reach += rough / k * rng.normal() * np.sin(k * turns + rng.uniform(0, 2 * math.pi))
    stretch = rng.uniform(0.5, 1.6)
    points = zip(radius * reach * np.cos(turns), radius * reach * np.sin(turns), strict=True)
    return [(x + stretch * float(u), y + float(v) / stretch) for u, v in points]


def palette(rng: Noise, count: int) -> np.ndarray:
    """[count, 3] colours that go together: spread around one, mostly in light."""
    middle = rng.uniform(40, 215, 3)
    light = rng.normal(0, rng.uniform(15, 60), (count, 1))
    return np.clip(middle + light + rng.normal(0, rng.uniform(5, 45), (count, 3)), 0, 255)


def blobs(rng: Noise, side: int) -> Image.Image:
    """Noise of several sizes over a slope, and a few blurred patches."""
    image = finished(slope(rng, side) + smooth(rng, side, (3, 6, 12, 24, 48)))
    for _ in range(rng.integers(0, 6)):
        mask = Image.new("L", (side, side), 0)
        points = rng.uniform(-0.1, 1.1, 2) * side + rng.normal(0, 0.2, (5, 2)) * side
        ImageDraw.Draw(mask).polygon([(float(u), float(v)) for u, v in points], fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 4)) * side / 96))
        fill = np.asarray(image, float)[::-1] * rng.uniform(0.3, 1.5, 3)
        image.paste(finished(fill), (0, 0), mask)
    return image


def leaves(rng: Noise, side: int) -> Image.Image:
    """Rough patches of all sizes, one over the other, few of them large: statistics like nature's
    (the dead-leaves model, Lee, Mumford and Huang 2001)."""
    colors = palette(rng, 24)
    image = finished(np.broadcast_to(colors[0], (side, side, 3)))
    pen = ImageDraw.Draw(image)
    rough = rng.uniform(0.05, 0.5)
    for _ in range(int(rng.integers(60, 500))):
        radius = side * 0.02 / (rng.random() + 0.03) ** rng.uniform(0.5, 1)
        x, y = rng.uniform(-0.1, 1.1, 2) * side
        fill = colors[rng.integers(len(colors))] + rng.normal(0, 6, 3)
        pen.polygon(outline(rng, x, y, radius, rough), fill=tuple(int(c) for c in fill))
    return _lit(rng, image, side)


def subject(rng: Noise, side: int) -> Image.Image:
    """One to three rounded bodies, lit from a side, before a blurred ground."""
    ground = finished(slope(rng, side) + smooth(rng, side, (3, 6, 12)))
    ground = ground.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.04)) * side))
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(0.2, 0.8, 2) * side
        radius = rng.uniform(0.12, 0.45) * side
        mask = Image.new("L", (side, side), 0)
        around = outline(rng, x, y, radius, float(rng.uniform(0.05, 0.4)))
        ImageDraw.Draw(mask).polygon(around, fill=255)
        soft = mask.filter(ImageFilter.GaussianBlur(radius / rng.uniform(2, 5)))
        dx, dy = (int(v) for v in rng.normal(0, radius / 3, 2))
        light = np.roll(np.asarray(soft, float), (dy, dx), (0, 1))[..., None] / 255
        fill = rng.uniform(10, 240, 3) * (0.35 + 0.9 * light)
        fill = fill + rng.uniform(0, 0.8) * smooth(rng, side, (8, 24, 48))
        edge = ImageFilter.GaussianBlur(float(rng.uniform(0.2, 2)) * side / 96)
        ground.paste(finished(fill), (0, 0), mask.filter(edge))
    return ground


def rows(rng: Noise, side: int) -> Image.Image:
    """Bricks, windows, shelves: fields of a raster that a view from a side bends."""
    colors = palette(rng, 12)
    image = finished(np.broadcast_to(colors[0], (side, side, 3)))
    pen = ImageDraw.Draw(image)
    wide, high = rng.uniform(0.05, 0.25, 2) * side
    gap, shift = rng.uniform(0.03, 0.4), rng.choice((0.0, 0.5))
    few = int(rng.integers(2, len(colors)))
    for row in range(-1, int(1.5 * side / high)):
        for column in range(-2, int(1.5 * side / wide)):
            x, y = (column + shift * (row % 2)) * wide, row * high
            corners = (x, y, x + wide * (1 - gap), y + high * (1 - gap))
            fill = colors[rng.integers(1, few)] + rng.normal(0, 8, 3)
            pen.rectangle(corners, fill=tuple(int(c) for c in fill))
    bend = rng.uniform(-0.002, 0.002, 2)
    data = (1, rng.uniform(-0.3, 0.3), 0, rng.uniform(-0.3, 0.3), 1, 0, *(bend * 96 / side))
    image = image.transform(
        (side, side), Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR
    )
    return _lit(rng, image, side)


def strokes(rng: Noise, side: int) -> Image.Image:
    """Grass, hair, rain, hatching: hundreds of short lines that keep to a direction."""
    colors = palette(rng, 16)
    ground = finished(np.broadcast_to(colors[0], (side, side, 3)) + smooth(rng, side, (3, 6)))
    pen = ImageDraw.Draw(ground)
    heading, spread = rng.uniform(0, math.pi), rng.uniform(0.05, 0.8)
    length, width = rng.uniform(0.05, 0.4) * side, max(1, int(rng.uniform(0.5, 2.5) * side / 96))
    for _ in range(int(rng.integers(100, 700))):
        x, y = rng.uniform(-0.1, 1.1, 2) * side
        angle = heading + rng.normal(0, spread)
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        color = colors[rng.integers(len(colors))]
        pen.line((x, y, *end), fill=tuple(int(c) for c in color), width=width)
    return ground


def scrawl(rng: Noise, side: int) -> Image.Image:
    """Lines of loops, as from a pen, on paper."""
    paper, ink = rng.uniform(190, 255), rng.uniform(0, 120, 3)
    image = finished(np.full((side, side, 3), paper) * rng.uniform(0.9, 1, 3))
    pen = ImageDraw.Draw(image)
    line = rng.uniform(0.05, 0.2) * side
    for row in range(int(side / line) + 1):
        x, y, turn = rng.uniform(0, 0.3) * side, (row + 0.5) * line, 0.0
        points = []
        for _ in range(int(rng.integers(40, 200))):
            turn += rng.uniform(0.2, 1.0)
            x += rng.uniform(0, 0.3) * line
            reach = line * rng.uniform(0.2, 0.5)
            points.append((x + 0.5 * reach * math.cos(turn), y + reach * math.sin(turn)))
        pen.line(points, fill=tuple(int(c) for c in ink), width=max(1, side // 96))
    return image


def plan(rng: Noise, side: int) -> Image.Image:
    """A plan or a diagram: empty frames and rings, joined by lines."""
    dark, light = rng.uniform(0, 90, 3), rng.uniform(200, 255, 3)
    ground, ink = (dark, light) if rng.random() < 0.2 else (light, dark)
    image = finished(np.broadcast_to(ground, (side, side, 3)))
    pen = ImageDraw.Draw(image)
    color, width = tuple(int(c) for c in ink), max(1, int(rng.uniform(0.5, 2) * side / 96))
    spots = rng.uniform(0.05, 0.95, (int(rng.integers(3, 12)), 2)) * side
    for (x0, y0), (x1, y1) in zip(spots, spots[1:], strict=False):
        corner = rng.random() < 0.5
        pen.line([(x0, y0), *([(x0, y1)] if corner else []), (x1, y1)], fill=color, width=width)
    for x, y in spots:
        u, v = rng.uniform(0.03, 0.15, 2) * side
        draw = pen.rectangle if rng.random() < 0.6 else pen.ellipse
        inside = tuple(int(c) for c in ground) if rng.random() < 0.7 else None
        draw((x - u, y - v, x + u, y + v), outline=color, width=width, fill=inside)
    return image


def specks(rng: Noise, side: int) -> Image.Image:
    """Stars, crumbs, lights out of focus: many small round spots on a dim ground."""
    image = finished(slope(rng, side) * rng.uniform(0.1, 1) + smooth(rng, side, (3, 6)))
    pen = ImageDraw.Draw(image)
    colors = palette(rng, 8)
    most = rng.uniform(0.005, 0.06) * side
    for _ in range(int(rng.integers(20, 250))):
        x, y = rng.uniform(0, side, 2)
        r = most * rng.random() ** 2 + 0.4
        fill = tuple(int(c) for c in colors[rng.integers(len(colors))])
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return _lit(rng, image, side)


def _lit(rng: Noise, image: Image.Image, side: int) -> Image.Image:
    """With uneven light, grain, and a lens not always sharp."""
    pixels = np.asarray(image, float)
    if rng.random() < 0.7:
        light = smooth(rng, side, (3, 5), 1) + rng.uniform(0, 0.6) * smooth(rng, side, (48,), 1)
        pixels = pixels * (1 + light / 200)
    image = finished(pixels + rng.normal(0, rng.uniform(0, 10), pixels.shape))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2)) * side / 96))


SORTS: tuple[Callable[[Noise, int], Image.Image], ...]
SORTS = (blobs, leaves, subject, rows, strokes, scrawl, plan, specks)
SHARES = (0.25, 0.15, 0.2, 0.1, 0.08, 0.08, 0.07, 0.07)
