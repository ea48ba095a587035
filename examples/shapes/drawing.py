"""Scenes to pictures of 96 x 96, what each patch of a picture shows, and the boxes of items."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.shapes import textures
from examples.shapes.world import MAX_HEIGHT, PATCH, SIZE, Bar, Box, Item, Print, Scene, Thing

SCALE = 2  # pictures are drawn at twice their size and averaged down
BASE = 91  # the chart's ground line, in pixels from the top
UNIT = 10.5  # pixels per unit of height
CAPITALS = 0.72  # height of Pillow's own font's capitals and digits, in units of its size
# pictures/NAME.png: held-out scenes to talk about, drawn four times as large.
SAMPLES = {"scene": 2_400_147_605, "chart": 2_400_000_317}


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
    if thing.shape == "circle":
        return [(math.sin(math.pi * i / 24), math.cos(math.pi * i / 24)) for i in range(48)]
    raise ValueError(f"no outline for shape {thing.shape!r}.")


def _corners(thing: Thing) -> list[tuple[float, float]]:
    """Corners in pixels of the finished picture."""
    c, s = math.cos(thing.turn), math.sin(thing.turn)
    return [
        (thing.x + thing.radius * (c * u - s * v), thing.y + thing.radius * (s * u + c * v))
        for u, v in _outline(thing)
    ]


@functools.lru_cache(maxsize=256)
def _font(size: int, path: str | None) -> ImageFont.FreeTypeFont:
    found = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType."
    return found


def _ink(item: Print, scale: float, path: str | None = None) -> tuple[ImageFont.FreeTypeFont, Box]:
    """The font, and the box of the ink when the text is drawn at (0, 0), both `scale` as large."""
    font = _font(round(item.height / CAPITALS * scale), path)
    return font, font.getbbox(item.text)


def text_width(item: Print, font: str | None = None) -> float:
    """How wide the ink is, in pixels of the finished picture; `font` as in `draw`."""
    x0, _, x1, _ = _ink(item, 4, font)[1]
    return (x1 - x0) / 4


def box(item: Thing | Print | Bar) -> Box:
    """x0, y0, x1, y1 of what is drawn, in pixels of the finished picture."""
    if isinstance(item, Bar):
        return (item.left, BASE - item.height * UNIT, item.left + item.width, BASE)
    if isinstance(item, Thing):
        xs, ys = zip(*_corners(item), strict=True)
        return (min(xs), min(ys), max(xs), max(ys))
    x0, y0, x1, y1 = _ink(item, 4)[1]
    w, h = (x1 - x0) / 8, (y1 - y0) / 8
    return (item.x - w, item.y - h, item.x + w, item.y + h)


def letters(item: Print) -> list[tuple[str, Box]]:
    """Each character of a print with its box, in pixels of the finished picture."""
    x0, y0, x1, y1 = box(item)
    font, _ = _ink(item, 4)
    ends = [font.getlength(item.text[:i]) for i in range(len(item.text) + 1)]
    xs = [x0 + (x1 - x0) * (end - ends[0]) / (ends[-1] - ends[0]) for end in ends]
    return [(c, (xs[i], y0, xs[i + 1], y1)) for i, c in enumerate(item.text)]


def _paint(
    draw: ImageDraw.ImageDraw, item: Item | Bar, fill: object, scale: int, font: str | None = None
) -> None:
    if isinstance(item, Bar):
        x0, y0, x1, y1 = (v * scale for v in box(item))
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill)  # type: ignore[arg-type]
    elif isinstance(item, Thing):
        corners = [(x * scale, y * scale) for x, y in _corners(item)]
        draw.polygon(corners, fill=fill)  # type: ignore[arg-type]
    elif isinstance(item, Print):
        face, (x0, y0, x1, y1) = _ink(item, scale, font)
        at = (item.x * scale - (x0 + x1) / 2, item.y * scale - (y0 + y1) / 2)
        draw.text(at, item.text, font=face, fill=fill)  # type: ignore[arg-type]


def _widen(scene: Scene, aspect: float) -> Scene:
    """Places, and bars, stretched to the sides; things and prints keep their form."""
    return replace(
        scene,
        things=tuple(replace(thing, x=thing.x * aspect) for thing in scene.things),
        prints=tuple(replace(text, x=text.x * aspect) for text in scene.prints),
        bars=tuple(
            replace(bar, left=bar.left * aspect, width=bar.width * aspect) for bar in scene.bars
        ),
    )


def _paper(scene: Scene, scale: int, aspect: float) -> Image.Image:
    side = SIZE * scale
    width = round(SIZE * aspect)
    image = Image.new("RGB", (width * scale, side), scene.paper)
    pen = ImageDraw.Draw(image)
    faint = tuple(c - 20 for c in scene.paper)
    pattern = scene.look.pattern
    if pattern == "shaded":
        fall = np.linspace(1.06, 0.88, side)[:, None, None]
        return Image.fromarray(np.clip(np.asarray(image) * fall, 0, 255).astype(np.uint8))
    for v in range(8, SIZE, 8):
        if pattern in ("lined", "squared"):
            pen.line((0, v * scale, width * scale, v * scale), fill=faint, width=scale // SCALE)
    for v in range(8, width, 8):
        if pattern == "squared":
            pen.line((v * scale, 0, v * scale, side), fill=faint, width=scale // SCALE)
    return image


def _look(image: Image.Image, scene: Scene) -> Image.Image:
    """Light, grain and JPEG, at the size that the picture has."""
    look = scene.look
    if look.light != 1.0 or look.grain:
        pixels = np.asarray(image, float) * look.light
        if look.grain:
            rng = np.random.default_rng([scene.seed, 1])
            pixels = pixels + rng.normal(0, look.grain, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if look.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=look.jpeg)
        image = Image.open(file).convert("RGB")
    return image


def draw(scene: Scene, times: int = 1, font: str | None = None, aspect: float = 1.0) -> Image.Image:
    """The scene as an RGB picture of 96 x 96, or `times` as large.

    font: a file of another typeface than the one that Pillow brings. aspect: the canvas is that
    much wider than high (a texture stays square), each thing in the same ninth as ever.
    """
    scale = SCALE * times
    if scene.kind == "texture":
        return _look(textures.picture(scene.seed, SIZE * times), scene)
    scene = _widen(scene, aspect)
    image = _paper(scene, scale, aspect)
    pen = ImageDraw.Draw(image)
    if scene.bars:
        faint = tuple(c - 26 for c in scene.paper)
        left, right = 6 * aspect * scale, 94 * aspect * scale
        for unit in range(1, MAX_HEIGHT + 1):
            y = (BASE - unit * UNIT) * scale
            pen.line((left, y, right, y), fill=faint, width=times)
    for item in scene.bars or scene.items:
        _paint(pen, item, item.rgb, scale, font)
    if scene.bars:
        dark = (70, 70, 70)
        pen.line((left, 3 * scale, left, BASE * scale), fill=dark, width=scale)
        pen.line((left, BASE * scale, right, BASE * scale), fill=dark, width=scale)
    return _look(image.reduce(SCALE), scene)


def spread(corners: Box, found: np.ndarray | None) -> Box:
    """The box around a box that a map (`camera`) has moved; None leaves it."""
    if found is None:
        return corners
    x0, y0, x1, y1 = corners
    x, y, w = found @ np.array([(x0, y0, 1), (x1, y0, 1), (x1, y1, 1), (x0, y1, 1)]).T
    return (min(x / w), min(y / w), max(x / w), max(y / w))


def patch_items(
    scene: Scene, found: np.ndarray | None = None, least: float = 0.08
) -> list[Thing | Print | Bar | None]:
    """For each patch, row by row: the item that covers most of it, a print by its whole box.

    found: the map by which the picture shows the scene as drawn (`camera`). An item must cover the
    share `least` of the patch; else there is None.
    """
    items = scene.bars or scene.items
    canvas = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(canvas)
    for i, item in enumerate(items):
        if isinstance(item, Print):
            pen.rectangle(box(item), fill=i + 1)
        else:
            _paint(pen, item, i + 1, 1)
    if found is not None:
        back = np.linalg.inv(found)
        data = tuple((back / back[2, 2]).ravel()[:8].tolist())
        canvas = canvas.transform(canvas.size, Image.Transform.PERSPECTIVE, data)
    side = SIZE // PATCH
    cells = np.asarray(canvas).reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3)
    shown: list[Thing | Print | Bar | None] = []
    for cell in cells.reshape(side * side, -1):
        count = np.bincount(cell, minlength=len(items) + 1)[1:]
        best = int(count.argmax()) if len(items) else -1
        shown.append(items[best] if best >= 0 and count[best] >= least * PATCH**2 else None)
    return shown


def patch_letters(scene: Scene, found: np.ndarray | None = None) -> list[str]:
    """For each patch, row by row: the printed character that covers most of it, or "";
    found: as in `patch_items`."""
    side = SIZE // PATCH
    best = [(0.0, "")] * side**2
    for item in scene.prints:
        for letter, at in letters(item):
            x0, y0, x1, y1 = spread(at, found)
            for row in range(max(int(y0 // PATCH), 0), min(int(y1 // PATCH), side - 1) + 1):
                for column in range(max(int(x0 // PATCH), 0), min(int(x1 // PATCH), side - 1) + 1):
                    w = min(x1, (column + 1) * PATCH) - max(x0, column * PATCH)
                    h = min(y1, (row + 1) * PATCH) - max(y0, row * PATCH)
                    seen = (w * h, letter)
                    if w * h >= 8:  # square pixels; less cannot be told
                        best[row * side + column] = max(best[row * side + column], seen)
    return [letter for _, letter in best]
