"""How a scene can come otherwise than in training: larger, tilted, photographed, on other paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFilter, ImageFont

from examples.shapes.camera import Map, compressed, cornered, in_place, moved, turned, warp
from examples.shapes.drawing import draw, text_width
from examples.shapes.qa import QA
from examples.shapes.questions import ask_one
from examples.shapes.world import Scene

TIMES = 4  # pictures that are "taken" are drawn so many times as large
SHRUNK = 64
GREY = (168, 168, 168)  # darker than any of the papers in training
DESKS = ((96, 70, 48), (52, 54, 60), (150, 116, 80), (92, 104, 96))
# Typefaces beside Pillow's own, by the names of their files; Pillow finds them in the system's
# folders. The first are Linux's, the others macOS's.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "LiberationSerif-Regular.ttf",
    "Arial.ttf",
    "Georgia.ttf",
    "Courier New.ttf",
)
# EXIF orientations that phones write, and how the sensor's picture lies: upright is turned by this.
SIDEWAYS = {
    6: Image.Transpose.ROTATE_90,
    3: Image.Transpose.ROTATE_180,
    8: Image.Transpose.ROTATE_270,
}


def larger(scene: Scene) -> Image.Image:
    return draw(scene, TIMES)


def shrunk(scene: Scene) -> Image.Image:
    """Of 64 px: the model's own preprocessing enlarges it again."""
    return draw(scene).resize((SHRUNK, SHRUNK), Image.Resampling.BICUBIC)


def jpeg(scene: Scene, quality: int = 30) -> Image.Image:
    return compressed(draw(scene), quality)


def grey_paper(scene: Scene) -> Image.Image:
    return draw(replace(scene, paper=GREY))


def greyscale(scene: Scene) -> Image.Image:
    return draw(scene).convert("L")


def landscape(scene: Scene) -> Image.Image:
    """On a canvas of 4:3, each thing in its ninth; the model's preprocessing makes it square."""
    return draw(scene, aspect=4 / 3)


def installed(fonts: Sequence[str] = FONTS) -> list[str]:
    """Those of the typefaces that this machine has."""
    found = []
    for name in fonts:
        try:
            ImageFont.truetype(name, 12)
        except OSError:
            continue
        found.append(name)
    return found


def typeset(scene: Scene, fonts: Sequence[str]) -> Image.Image:
    """Printed in one of the typefaces, smaller where a word would leave the place it was given."""
    font = fonts[scene.seed % len(fonts)]
    prints = []
    for item in scene.prints:
        room = 2 * item.reach[0]
        prints.append(replace(item, height=item.height * min(1, room / text_width(item, font))))
    return draw(replace(scene, prints=tuple(prints)), font=font)


def sideways(scene: Scene, folder: Path) -> Path:
    """A JPEG file as phones write it: the picture lying on its side or head, and an EXIF tag that
    says so."""
    orientation = list(SIDEWAYS)[scene.seed % len(SIDEWAYS)]
    return store(larger(scene), folder / f"{scene.seed}.jpg", orientation)


def store(image: Image.Image, path: Path, orientation: int) -> Path:
    """Writes an upright picture as a JPEG of this EXIF orientation: 6, 3 or 8."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.transpose(SIDEWAYS[orientation]).save(path, quality=90, exif=exif)
    return path


def tilt(scene: Scene, degrees: float) -> Map:
    """A turn to the side that the seed decides."""
    return turned(degrees if scene.seed % 2 else -degrees)


def camera(scene: Scene) -> Map:
    """A view from somewhere above the paper: each corner up to 8% inside the picture's."""
    rng = np.random.default_rng([scene.seed, 2])
    return cornered(rng.uniform(0.01, 0.08, (4, 2)))


def tilted(scene: Scene, degrees: float) -> Image.Image:
    return warp(larger(scene), tilt(scene, degrees), scene.paper)


def photographed(scene: Scene) -> Image.Image:
    """Perspective on a desk, uneven light, a soft lens, a noisy sensor, JPEG."""
    rng = np.random.default_rng([scene.seed, 3])
    desk = DESKS[scene.seed % len(DESKS)]
    image = warp(larger(scene), camera(scene), desk)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 3.0))))
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = 0.92 + 0.16 * (x * math.cos(angle) + y * math.sin(angle)) - 0.06 * (x * x + y * y)
    warmth = rng.uniform(0.94, 1.06, 3)
    pixels = np.asarray(image, float) * light[..., None] * warmth
    pixels += rng.normal(0, 12, pixels.shape)
    return compressed(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), 70)


def stays(scene: Scene, qa: QA, maps: Sequence[Map]) -> bool:
    """Whether the question has the same answer where each of the maps brings the items.

    Near the line between two ninths, or hardly left of each other, they would change sides.
    """
    for found in maps:
        there = moved(scene, found)
        if not in_place(scene, there):
            return False
        again = ask_one(qa.kind, there, "exam")
        if again is None or (again.question, again.answer) != (qa.question, qa.answer):
            return False
    return True
