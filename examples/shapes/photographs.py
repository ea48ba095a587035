"""Pictures that are no drawn scenes, and what people ask about such.

What the model is trained to refuse is of the sorts in `textures`. Nothing here is made like those:
screenshots of text, line drawings, plotted curves, landscapes, woven patterns; and real
photographs, whole and in parts, from folders that the caller names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from examples.shapes.drawing import draw
from examples.shapes.phrases import OUTSIDE
from examples.shapes.qa import QA
from examples.shapes.questions import ask_many
from examples.shapes.world import Scene, make_scene, seeds
from mlxvlm.errors import PictureError
from mlxvlm.images.open import open_picture

SIDE = 288
CROPS = 3  # parts of a photograph, beside the whole
# What people ask about a photograph; none of it stands in `phrases.OUTSIDE_ASKS` or `ASKS`.
ORDINARY = (
    "What is this?",
    "What is in this photo?",
    "Where is that?",
    "Who is the person on the left?",
    "Describe this photo for me.",
    "Is there anybody in it?",
    "What is happening here?",
    "Is it day or night?",
    "What kind of animal is it?",
    "What does the sign say?",
    "How old is this building?",
    "Is this a real photo?",
    "what colour is the sky",
    "How many people are there?",
)
# Red, green and blue of a sky, high and low: from, to.
SKIES = (((60, 150), (120, 190), (190, 250)), ((170, 250), (190, 235), (180, 250)))
LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


def textures(split: str = "heldout") -> Iterator[Image.Image]:
    """As in training, but of another split."""
    for seed in seeds(split):
        scene = make_scene(seed)
        if scene.kind == "texture":
            yield draw(scene)


def screenshot(rng: random.Random) -> Image.Image:
    """Lines of small made-up words in a column or two, under a title bar."""
    dark = rng.random() < 0.3
    ground, ink = ((30, 31, 36), (205, 205, 210)) if dark else ((252, 252, 252), (40, 42, 48))
    image = Image.new("RGB", (SIDE * 4 // 3, SIDE), ground)
    pen = ImageDraw.Draw(image)
    size = rng.randint(8, 12)
    font = ImageFont.load_default(size)
    pen.rectangle((0, 0, image.width, 18), fill=(70, 100, 160) if dark else (222, 225, 230))
    columns = rng.choice((1, 1, 2))
    wide = (image.width - 20) / columns
    for column in range(columns):
        left, y = 10 + column * wide, 26
        while y < SIDE - size:
            x, end = left, left + wide * rng.uniform(0.5, 0.94)
            while x < end and rng.random() < 0.97:
                word = "".join(rng.choices(LETTERS, range(26, 0, -1), k=rng.randint(1, 9)))
                pen.text((x, y), word, font=font, fill=ink)
                x += font.getlength(word + " ")
            y += round(size * (1.4 if rng.random() < 0.85 else 2.6))
    return image


def line_drawing(rng: random.Random) -> Image.Image:
    """A few long strokes of a pencil, some of them closed, none of them filled."""
    image = Image.new("RGB", (SIDE, SIDE), rng.choice(((255, 255, 255), (245, 240, 226))))
    pen = ImageDraw.Draw(image)
    ink = rng.choice(((30, 30, 34), (60, 60, 66), (40, 50, 110)))
    for _ in range(rng.randint(4, 10)):
        x, y = rng.uniform(0.1, 0.9) * SIDE, rng.uniform(0.1, 0.9) * SIDE
        heading, bend = rng.uniform(0, 2 * math.pi), 0.0
        points = [(x, y)]
        for _ in range(rng.randint(20, 120)):
            bend = 0.9 * bend + rng.gauss(0, 0.08)
            heading += bend
            x, y = x + 3 * math.cos(heading), y + 3 * math.sin(heading)
            points.append((x, y))
        pen.line(points, fill=ink, width=rng.randint(1, 3), joint="curve")
    return image.filter(ImageFilter.GaussianBlur(0.6))


def curve(rng: random.Random) -> Image.Image:
    """A plot: axes, ticks with numbers, and one to three curves."""
    image = Image.new("RGB", (SIDE * 4 // 3, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(10)
    left, bottom, right, top = 36, SIDE - 28, image.width - 12, 12
    pen.rectangle((left, top, right, bottom), outline=(60, 60, 60))
    for i in range(1, 6):
        x, y = left + i * (right - left) / 6, bottom - i * (bottom - top) / 6
        pen.text((x - 6, bottom + 6), str(20 * i), font=font, fill=(60, 60, 60))
        pen.text((6, y - 6), f"{0.2 * i:.1f}", font=font, fill=(60, 60, 60))
        if rng.random() < 0.5:
            pen.line((left, y, right, y), fill=(225, 225, 225))
    for _ in range(rng.randint(1, 3)):
        ink = tuple(rng.randint(0, 200) for _ in range(3))
        level, step = rng.random(), rng.uniform(0.01, 0.06)
        points = []
        for x in range(left, right, 2):
            level = min(max(level + rng.gauss(0, step), 0.02), 0.98)
            points.append((x, bottom - level * (bottom - top)))
        pen.line(points, fill=ink, width=2)
    return image


def landscape(rng: random.Random) -> Image.Image:
    """Sky over ridges, one behind the other, with grain and a soft lens."""
    wide = SIDE * 3 // 2
    up = np.linspace(0, 1, SIDE)[:, None, None]
    high, low = (np.array([rng.uniform(*span) for span in spans]) for spans in SKIES)
    pixels = (high + (low - high) * up) * np.ones((SIDE, wide, 3))
    noise = np.random.default_rng(rng.randrange(2**32))
    x = np.linspace(0, 1, wide)
    ridges = rng.randint(2, 5)
    for i in range(ridges):
        near = (i + 1) / ridges
        line = np.full(wide, 0.35 + 0.5 * near)
        for k in range(1, 7):
            line += rng.uniform(-0.12, 0.12) / k * np.sin(2 * math.pi * k * (x + rng.random()))
        fill = np.array([rng.uniform(20, 110), rng.uniform(50, 130), rng.uniform(20, 100)])
        fill = fill * near + low * (1 - near)
        rough = noise.normal(0, 14 * near, (SIDE, wide, 1))
        pixels = np.where(up >= line[None, :, None], fill + rough, pixels)
    pixels += noise.normal(0, 4, pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


def weave(rng: random.Random) -> Image.Image:
    """Crossing stripes of a few colours, as cloth has them."""
    threads = [np.array([rng.uniform(0, 255) for _ in range(3)]) for _ in range(rng.randint(2, 5))]
    lines = [np.zeros((SIDE, 3)), np.zeros((SIDE, 3))]
    pattern = [(rng.choice(threads), rng.randint(3, 30)) for _ in range(rng.randint(3, 7))]
    for line in lines:
        at = 0
        while at < SIDE:
            for color, width in pattern:
                line[at : at + width] = color
                at += width
    across, down = lines
    y, x = np.mgrid[:SIDE, :SIDE]
    over = ((x // 2 + y // 2) % 2)[..., None]
    pixels = np.where(over, across[None], down[:, None])
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.8))


PAINTERS: dict[str, Callable[[random.Random], Image.Image]] = {
    "a screenshot of text": screenshot,
    "a line drawing": line_drawing,
    "a plotted curve": curve,
    "a painted landscape": landscape,
    "woven cloth": weave,
}


def painted(name: str, count: int) -> list[Image.Image]:
    """`count` pictures of one of the `PAINTERS`."""
    return [PAINTERS[name](random.Random(f"{name} {number}")) for number in range(count)]


def real(sources: Iterable[Path]) -> list[tuple[str, Image.Image]]:
    """The pictures in files and folders, each whole and in `CROPS` parts, with their files' names.

    Files that are no pictures are passed over.
    """
    found = []
    for source in sources:
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            try:
                image = open_picture(file)[0] if file.is_file() else None
            except PictureError:
                continue
            if image is None:
                continue
            found.append((file.name, image))
            rng = random.Random(f"parts {file.name}")
            for _ in range(CROPS):
                side = int(min(image.size) * rng.uniform(0.4, 0.8))
                x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
                found.append((file.name, image.crop((x, y, x + side, y + side))))
    return found


def drawn_questions(number: int, count: int) -> list[QA]:
    """What could be asked about some held-out drawn scene; here the answer is that it is none."""
    scene = _scene(number)
    qas = ask_many(scene, count, "photographs")
    return [QA("outside", qa.ask, qa.question, OUTSIDE) for qa in qas]


def ordinary_questions(number: int, count: int) -> list[QA]:
    asked = random.Random(f"ordinary {number}").sample(ORDINARY, count)
    return [QA("outside", question, question, OUTSIDE) for question in asked]


def _scene(number: int) -> Scene:
    """Some scene with something drawn in it."""
    found = (make_scene(seed) for seed in seeds("heldout", 500_000_000 + 1000 * number))
    return next(scene for scene in found if scene.kind != "texture")
