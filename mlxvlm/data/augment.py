"""What is done to pictures in training, and never in validation or before a cache.

JPEG at a quality drawn from 75 to 100, each tile its own, as InternVL 2.5 does it: pictures from
the web come in all qualities, and a model should not care.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..images.picture import Picture

LOWEST, HIGHEST = 75, 100

# A picture and what it is a function of: (seed, epoch, row, place in the row).
Augmentation = Callable[[Picture, tuple[Any, ...]], Picture]


def jpeg(picture: Picture, key: tuple[Any, ...]) -> Picture:
    """The picture with each uint8 view [H, W, 3] through JPEG; the same for the same key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    qualities = rng.integers(LOWEST, HIGHEST, len(picture.views), endpoint=True)
    views = [
        through_jpeg(view, int(quality))
        for view, quality in zip(picture.views, qualities, strict=True)
    ]
    return dataclasses.replace(picture, views=views)


def through_jpeg(view: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [H, W, 3], encoded and decoded."""
    with io.BytesIO() as file:
        Image.fromarray(view).save(file, "JPEG", quality=quality)
        file.seek(0)
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))


AUGMENTATIONS: dict[str, Augmentation] = {"jpeg": jpeg}
