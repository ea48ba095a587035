"""Boxes and points drawn on a picture, and the picture as a file."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..boxes import Box
from ..durable import write_whole
from ..errors import PictureError, UsageError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Far apart in hue, each against a white or black letter; the casing parts them from the picture.
COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#ffe119", "#911eb4", "#f58231", "#46f0f0", "#f032e6")
SMALLEST_FONT = 8

Rectangle = tuple[float, float, float, float]


def draw(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB image with each box framed and each point ringed, in colours that cycle.

    Each has its label on a chip inside the picture, or its number where it has none and is not
    alone, or where the label is in no Latin letters. Lines and letters are sized by the picture.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image)
    line = max(1, round(sum(image.size) / 500))
    numbered = len(boxes) > 1
    chips: list[tuple[str, str, Rectangle]] = []
    for number, box in enumerate(boxes, start=1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        place = _mark(pen, box, image.size, line, colour)
        if text := _ascii(box.label) or (str(number) if numbered or box.label else ""):
            chips.append((text, colour, place))
    taken: list[Rectangle] = []
    for text, colour, place in chips:  # after all frames, so that none crosses a label
        taken.append(_chip(pen, text, colour, place, image.size, line, taken))
    return image


def check_target(path: str | os.PathLike[str]) -> Path:
    """A file that `save` will be able to write, as far as one can tell; UsageError otherwise."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"a picture is drawn into a {', '.join(FORMATS)} file, not {str(path)!r}: give it one "
            "of these endings."
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it to draw into.")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to draw into: make it first.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"{path} may not be written: name a place of your own to draw into.")
    return path


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture in the format that its ending names, whole or not at all."""
    file = io.BytesIO()
    kind = FORMATS[path.suffix.lower()]
    try:
        image.save(file, format=kind, **({} if kind == "PNG" else {"quality": 92}))
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65535
        size = f"{image.width} x {image.height}"
        raise PictureError(
            f"a picture of {size} cannot be written as {kind} ({error}): name a .png file."
        ) from error
    write_whole(path, file.getvalue())


def _mark(
    pen: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], line: int, colour: str
) -> Rectangle:
    """Draws one frame or ring, cased in black and white; the pixels that it covers."""
    width, height = size
    x0, y0, x1, y1 = box.pixels(width, height)
    casing = max(1, line // 2)
    if box.is_point:
        x, y = min(x0, width - 1), min(y0, height - 1)
        for radius, fill in ((3 * line + casing, "white"), (3 * line, colour), (line, "black")):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        radius = 3 * line + casing
        return x - radius, y - radius, x + radius, y + radius
    # Pixels, both ends drawn; a box thinner than its lines is still a pixel wide.
    left, top = min(round(x0), width - 1), min(round(y0), height - 1)
    right, bottom = max(left, round(x1) - 1), max(top, round(y1) - 1)
    outer = (left - casing, top - casing, right + casing, bottom + casing)
    pen.rectangle(outer, outline="white", width=casing)
    pen.rectangle((left, top, right, bottom), outline=colour, width=line)
    inner = (left + line, top + line, right - line, bottom - line)
    if inner[2] - inner[0] > 2 * line and inner[3] - inner[1] > 2 * line:
        pen.rectangle(inner, outline="black", width=max(1, line // 3))
    return left, top, right, bottom


def _chip(
    pen: ImageDraw.ImageDraw,
    text: str,
    colour: str,
    place: Rectangle,
    size: tuple[int, int],
    line: int,
    taken: list[Rectangle],
) -> Rectangle:
    """Writes a label by its box, inside the picture, clear of earlier ones if it can be."""
    gap = max(2, line)
    text, font = _fitted(pen, text, size, gap)
    _, top, _, bottom = pen.textbbox((0, 0), "Ågj", font=font)  # all chips alike in height
    left, _, right, _ = pen.textbbox((0, 0), text, font=font)
    wide, high = right - left + 2 * gap, bottom - top + 2 * gap
    spots = [_inside(x, y, wide, high, size) for x, y in _corners(place, wide, high, size)]
    free = [spot for spot in spots if not any(_meet(spot, other) for other in taken)]
    spot = (free or spots)[0]
    pen.rectangle(spot, fill=colour)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    pen.text((spot[0] + gap - left, spot[1] + gap - top), text, fill=ink, font=font)
    return spot


def _fitted(
    pen: ImageDraw.ImageDraw, text: str, size: tuple[int, int], gap: int
) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The text and its font: smaller, and then shorter, until the picture is wide enough."""
    points = max(SMALLEST_FONT, 10 if min(size) > 100 else SMALLEST_FONT, round(sum(size) / 70))
    room = size[0] - 2 * gap - 1
    while True:
        font = ImageFont.load_default(points)
        if pen.textlength(text, font=font) <= room:
            return text, font
        if points == SMALLEST_FONT:
            break
        points = max(SMALLEST_FONT, points * 4 // 5)
    while len(text) > 1 and pen.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text.rstrip() + "...", font


def _ascii(label: str) -> str:
    """A label in the letters of Pillow's own font, without accents; empty if it is in others."""
    label = label.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xDF: "ss"})
    bare = "".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c))
    return bare if bare.isascii() and bare.isprintable() else ""


def _corners(
    place: Rectangle, wide: float, high: float, size: tuple[int, int]
) -> Iterator[tuple[float, float]]:
    """Where a chip's top left corner may go: rather beside what is marked than on it."""
    left, top, right, bottom = place
    if top >= high:
        yield left, top - high
    if bottom - top > 3 * high and right - left > wide:
        yield left, top
    if bottom + 1 + high <= size[1]:
        yield left, bottom + 1
    if right + 1 + wide <= size[0]:
        yield right + 1, top
    if left >= wide:
        yield left - wide, top
    yield left, top


def _inside(x: float, y: float, wide: float, high: float, size: tuple[int, int]) -> Rectangle:
    x = max(0, min(x, size[0] - wide))
    y = max(0, min(y, size[1] - high))
    return x, y, x + wide - 1, y + high - 1


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
