"""Writes preprocess.npz: what transformers' own processors make of a few drawn pictures.

    python tests/golden/make_preprocess.py

Holds, all of it from transformers' output (normalised float32 [S, S, 3]):
    small/<processor>/<resample>/<width>x<height>   a whole view at SMALL pixels a side, as uint8
                                                    (what its normalisation started from)
    real/<processor>/<width>x<height>               SAMPLES values spread over a view of real size
    sums/<processor>/<width>x<height>               sha256 of that whole view as uint8
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("preprocess.npz")
SIZES = ((640, 480), (37, 501), (384, 384), (1, 1), (1000, 17), (336, 337), (23, 24), (299, 300))
SMALL = 24
REAL = {"siglip": 384, "clip": 336, "llava": 336}
SAMPLES = 96
MEAN_STD = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "llava": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def scene(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: slopes, edges and texture, by integer arithmetic alone."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    slope = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), x ^ y], -1)
    boxes = (((x // 16 + y // 11) % 3) * 97)[:, :, None]
    noise = ((x * 7919 + y * 104729 + x * y * 31) % 251)[:, :, None] * np.array([1, 2, 3])
    return ((slope + boxes + noise) % 256).astype(np.uint8)


def processor(kind: str, size: int, resample: str):
    """The reference: transformers' processor on Pillow, as `kind`'s checkpoints configure it."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    square = {"height": size, "width": size}
    mean, std = MEAN_STD[kind]
    common = {
        "resample": Image.Resampling[resample.upper()],
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if kind == "siglip":
        return SiglipImageProcessorPil(size=square, **common)
    shortest = {"shortest_edge": size}
    if kind == "clip":
        return CLIPImageProcessorPil(size=shortest, crop_size=square, **common)
    return LlavaImageProcessorPil(size=shortest, crop_size=square, do_pad=True, **common)


def reference(kind: str, size: int, resample: str, pixels: np.ndarray) -> np.ndarray:
    """Normalised float32 [size, size, 3]."""
    from PIL import Image

    image = Image.fromarray(pixels)
    views = processor(kind, size, resample)(image, return_tensors="np")["pixel_values"]
    return np.asarray(views[0]).transpose(1, 2, 0)


def to_pixels(kind: str, view: np.ndarray) -> np.ndarray:
    """The uint8 that a normalised view came from."""
    mean, std = MEAN_STD[kind]
    exact = (view.astype(np.float64) * std + mean) * 255
    pixels = np.round(exact)
    assert np.abs(exact - pixels).max() < 1e-3
    return pixels.astype(np.uint8)


def sample(view: np.ndarray) -> np.ndarray:
    """SAMPLES values spread over all of a view."""
    flat = view.reshape(-1)
    return flat[np.arange(SAMPLES) * (flat.size - 1) // (SAMPLES - 1)]


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for width, height in SIZES:
        pixels, name = scene(width, height), f"{width}x{height}"
        for kind, size in REAL.items():
            for resample in ("bicubic", "bilinear"):
                small = to_pixels(kind, reference(kind, SMALL, resample, pixels))
                arrays[f"small/{kind}/{resample}/{name}"] = small
            view = reference(kind, size, "bicubic", pixels)
            digest = hashlib.sha256(to_pixels(kind, view).tobytes()).digest()
            arrays[f"real/{kind}/{name}"] = sample(view)
            arrays[f"sums/{kind}/{name}"] = np.frombuffer(digest, np.uint8)
    np.savez_compressed(FILE, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
