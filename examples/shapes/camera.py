"""Scenes as cameras and scanners bring them: askew, soft, dim, resized; for the training pictures.

A map takes pixels of a scene as drawn to pixels of the picture of it, both 96 x 96. What is asked
about a shot is asked about the scene as it came to lie; scenes whose items would change their
ninths stay as drawn.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from examples.shapes.drawing import draw
from examples.shapes.world import MAX_PRINTS, SIZE, Print, Scene, Thing

# 3 x 3, on (x, y, 1) in pixels.
Map = np.ndarray

SHOTS = 0.4  # of the training pictures
TIMES = 2  # shots are drawn so many times as large
TILT = 12.0  # degrees, at most
INWARD = 0.1  # of a side, at most, that a corner comes to lie within the picture


def turned(degrees: float) -> Map:
    """A turn about the middle, as small that all stays seen."""
    angle = math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    size = 1 / (c + abs(s))
    turn = np.array([[size * c, -size * s, 0], [size * s, size * c, 0], [0, 0, 1]])
    to_middle = np.array([[1, 0, -SIZE / 2], [0, 1, -SIZE / 2], [0, 0, 1]])
    return np.linalg.inv(to_middle) @ turn @ to_middle


def cornered(inward: np.ndarray) -> Map:
    """A view from above the paper: each corner, clockwise from the top left, comes to lie inside
    by these shares [4, 2] of the picture's sides."""
    square = np.array([(0, 0), (SIZE, 0), (SIZE, SIZE), (0, SIZE)], float)
    signs = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
    rows, wanted = [], []
    for (x, y), (u, v) in zip(square, square + signs * inward * SIZE, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    return np.append(np.linalg.solve(np.array(rows), wanted), 1).reshape(3, 3)


def moved(scene: Scene, found: Map) -> Scene:
    """The scene's things and prints at the places that the map brings them to."""

    def move(item: Thing | Print) -> dict[str, float]:
        x, y, w = found @ (item.x, item.y, 1)
        return {"x": float(x / w), "y": float(y / w)}

    things = tuple(replace(thing, **move(thing)) for thing in scene.things)
    prints = tuple(replace(item, **move(item)) for item in scene.prints)
    return replace(scene, things=things, prints=prints)


def in_place(scene: Scene, other: Scene) -> bool:
    """Whether all items stand in the same ninths."""
    places = [[(item.row, item.column) for item in each.items] for each in (scene, other)]
    return places[0] == places[1]


def warp(image: Image.Image, found: Map, around: tuple[int, int, int]) -> Image.Image:
    """The picture as `found` maps it, in a picture of the same size."""
    scale = np.diag([image.width / SIZE, image.height / SIZE, 1])
    back = np.linalg.inv(scale @ found @ np.linalg.inv(scale))
    data = tuple((back / back[2, 2]).ravel()[:8].tolist())
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC, fillcolor=around
    )


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """Through JPEG and back."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class Shot:
    """A picture of 96 x 96, the scene as it was drawn, and where that lies in the picture.

    map: None where it lies as drawn.
    """

    image: Image.Image
    drawn: Scene
    map: Map | None = None

    @property
    def scene(self) -> Scene:
        """What there is to ask about."""
        return self.drawn if self.map is None else moved(self.drawn, self.map)


def as_drawn(scene: Scene) -> Shot:
    return Shot(draw(scene), scene)


def shoot(scene: Scene) -> Shot:
    """A training picture of the scene: as drawn, or, in the share `SHOTS`, from a camera."""
    rng = np.random.default_rng([scene.seed, 4])
    if rng.random() >= SHOTS:
        return as_drawn(scene)
    found = None
    sort = rng.random()
    if sort < 0.4:
        found = turned(float(rng.uniform(-TILT, TILT)))
    elif sort < 0.8:
        found = cornered(rng.uniform(0, INWARD, (4, 2)))
    page = len(scene.prints) > MAX_PRINTS  # of which nobody asks what stands where
    if found is not None and not page and not in_place(scene, moved(scene, found)):
        return as_drawn(scene)
    if rng.random() < 0.3:
        grey = int(rng.integers(140, 200))
        scene = replace(scene, paper=(grey, grey, grey))
    image = draw(scene, TIMES)
    if found is not None:
        red, green, blue = rng.integers(30, 200, 3).tolist()
        image = warp(image, found, scene.paper if rng.random() < 0.5 else (red, green, blue))
    return Shot(_developed(image, rng), scene, found)


def _developed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A soft lens, uneven light, a tinted and noisy sensor, and the way to 96 x 96."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.5))))
    if rng.random() < 0.5:
        y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
        angle = rng.uniform(0, 2 * math.pi)
        fall = rng.uniform(0, 0.18)
        light = rng.uniform(0.85, 1.03) + fall * (x * math.cos(angle) + y * math.sin(angle))
        pixels = np.asarray(image, float) * light[..., None] * rng.uniform(0.94, 1.06, 3)
        pixels += rng.normal(0, rng.uniform(0, 12), pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        side = int(rng.integers(56, 96))
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return compressed(image, int(rng.integers(30, 95))) if rng.random() < 0.4 else image
