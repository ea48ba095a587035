"""Small pictures and encoders to fill caches with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.images.picture import Features, Picture
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder

VISION = VisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)


def siglip(seed: int = 0, tiling: TilingConfig | None = None, **options: Any) -> Encoder:
    """A SigLIP of two layers: 16 tokens of width 32; one view a picture, unless `tiling` says."""
    mx.random.seed(seed)
    tiling = tiling or TilingConfig(image_size=32)
    return Encoder(build_vision(VISION), VISION, tiling, **options)


class Slicer:
    """A stand-in whose pictures have one to three views of different sizes.

    A view's features are a function of its pixels alone; `spoil` maps a sha256 to what every
    feature of that picture becomes.
    """

    def __init__(self) -> None:
        self.spoil: dict[str, float] = {}
        self.batches: list[int] = []

    def look(self, images: list[bytes]) -> list[Picture]:
        from mlxvlm.images.open import open_picture

        pictures = []
        for data in images:
            image, sha256 = open_picture(data)
            count = 1 + image.width % 3
            views = [np.asarray(image.resize((8, 8 * (i + 1)))) for i in range(count)]
            pictures.append(Picture(views, (1, count), image.size, sha256))
        return pictures

    def encode(self, pictures: list[Picture]) -> list[Features]:
        self.batches.append(len(pictures))
        return [
            Features([self._view(v, p.sha256) for v in p.views], p.grid, p.size, p.sha256)
            for p in pictures
        ]

    def _view(self, view: np.ndarray, sha256: str | None) -> mx.array:
        if sha256 in self.spoil:
            return mx.full((view.shape[0], 24), self.spoil[sha256])
        return mx.array(view.reshape(view.shape[0], -1).astype(np.float32) / 255)

    def identity(self) -> dict[str, Any]:
        return {"model_type": "slicer", "dtype": "float32", "image_mean": (0.5, 0.5, 0.5)}


def draw(folder: Path, count: int, width: int = 20, seed: int = 0) -> list[tuple[str, Path]]:
    """Writes 000.png, 001.png, ... of different content; (name, path) of each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (16, width + i % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png", compress_level=1)
    return listed(folder)


def listed(folder: Path) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted(folder.iterdir())]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards(folder: Path) -> dict[str, bytes]:
    """Every shard of a cache, by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}
