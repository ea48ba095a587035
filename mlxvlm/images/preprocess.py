"""One view of a picture, pixel for pixel as the encoders' own processors make it.

    squash   both sides to `size`                                  SigLIP
    crop     the shortest side to `size`, then the middle square   CLIP; LLaVA-1.5's first stage
    pad      on a square canvas, the picture in the middle         LLaVA-1.5's second stage

All stay in uint8 and use Pillow's antialiased filters; the encoder normalises.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# A longer side is shrunk first: the resampler's scratch grows with it. JPEG's sides end here.
MAX_SIDE = 65535
# The same for `pad`, whose work grows with the side's square.
MAX_PAD_SIDE = 16384
# A strip longer than this many times its width keeps its middle before a crop.
MAX_ASPECT = 128
# Pixels of canvas that `pad` holds at a time.
BAND = 2**22


def squash(image: Image.Image, size: int, resample: str) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3], the aspect ratio given up."""
    return stretch(image, size, size, resample)


def stretch(image: Image.Image, width: int, height: int, resample: str) -> np.ndarray:
    """RGB image -> uint8 [height, width, 3], the aspect ratio given up."""
    return np.array(_bounded(image, MAX_SIDE).resize((width, height), FILTERS[resample]))


def tiles(canvas: np.ndarray, side: int) -> list[np.ndarray]:
    """uint8 [rows * side, columns * side, 3] -> its tiles [side, side, 3], row after row."""
    rows, columns = canvas.shape[0] // side, canvas.shape[1] // side
    # [rows, side, columns, side, 3] -> [rows * columns, side, side, 3]
    return [*canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)]


def crop(image: Image.Image, size: int, resample: str) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3], the ends of the longer side given up."""
    image = _middle(image)
    short, long = sorted(image.size)
    length = int(size * long / short)  # truncated, as transformers does
    resized = image.resize(
        (size, length) if image.width <= image.height else (length, size), FILTERS[resample]
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def pad(
    image: Image.Image, size: int, resample: str, background: tuple[int, int, int]
) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3], whole, with bars of `background` on two sides.

    Equal to a resize of the padded square, bit for bit, without ever holding that square: Pillow
    resamples rows first, then columns, each by itself, so bars above and below need no first pass,
    and bars to the left and right can be added a band of rows at a time.
    """
    image = _bounded(image, MAX_PAD_SIDE)
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (size, side), background)
    if width == side:
        canvas.paste(image.resize((size, height), FILTERS[resample]), (0, top))
    else:
        step = max(1, BAND // side)
        for y in range(0, side, step):
            rows = min(step, side - y)
            band = Image.new("RGB", (side, rows), background)
            band.paste(image.crop((0, y, width, y + rows)), (left, 0))
            canvas.paste(band.resize((size, rows), FILTERS[resample]), (0, y))
    return np.array(canvas.resize((size, size), FILTERS[resample]))


def _bounded(image: Image.Image, limit: int) -> Image.Image:
    side = max(image.size)
    if side <= limit:
        return image
    width, height = (max(1, round(s * limit / side)) for s in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _middle(image: Image.Image) -> Image.Image:
    spare = max(image.size) - MAX_ASPECT * min(image.size)
    if spare <= 0:
        return image
    start = spare // 2
    x, y = (start, 0) if image.width > image.height else (0, start)
    return image.crop((x, y, image.width - x, image.height - y))
