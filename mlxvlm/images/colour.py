"""Any Pillow mode or NumPy array as 8-bit RGB over white.

How values wider than 8 bits become 0-255 (scaled, never clipped):

    16-bit        value / 257, so 65535 is white; a 12-bit TIFF is white at 4095
    32-bit ints   0..255 as they are; 0..65535 as 16-bit; otherwise stretched: lowest 0, highest 255
    floats        0..1 times 255; whole numbers in 0..255 as they are; otherwise stretched.
                  NaN counts as the lowest finite value, infinities as the nearest end
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..errors import PictureError

WHITE = (255, 255, 255, 255)
# Modes that hold one wide number a pixel; Pillow's own convert() clips them to 0-255.
WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Pixels that are converted at a time, so that a large picture needs no third copy of itself.
BAND = 2**22
# TIFF tags
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def to_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A new RGB image, without alpha and without metadata; `image` itself is left alone.

    Beside the two, memory for a band of rows is needed.
    """
    try:
        if image.mode in WIDE:
            rgb = _wide_to_rgb(image, name)
        elif _has_alpha(image):
            rgb = _by_bands(image, _over_white)
        elif image.mode == "RGB":
            rgb = image.copy()
        else:
            rgb = _by_bands(image, lambda band: band.convert("RGB"))
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        raise PictureError(
            f"{name} cannot be turned from mode {image.mode} into RGB ({error}): "
            "save it as PNG or JPEG first."
        ) from error
    # Metadata would be taken for true again: the orientation has been applied, the alpha is gone.
    rgb.info = {}
    return rgb


def array_to_rgb(array: np.ndarray, name: str = "the array") -> Image.Image:
    """[H, W] or [H, W, C] of bools, integers or floats as an RGB image.

    C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise PictureError(
            f"{name} must have the shape [height, width] or [height, width, 1 to 4 channels], not "
            f"{list(array.shape)}: put the channels last."
        )
    if array.dtype.kind not in "buif":
        raise PictureError(f"{name} must hold numbers, not {array.dtype}.")
    channels = array.shape[2]
    colours = channels if channels % 2 else channels - 1
    pixels = to_uint8(array[:, :, :colours], name=name)
    if colours == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if colours < channels:
        alpha = to_uint8(array[:, :, colours], name=name)
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
        return to_rgb(image, name)
    return image


def to_uint8(values: np.ndarray, white: int | None = None, name: str = "the array") -> np.ndarray:
    """Numbers of any type as uint8 of the same shape, by the rules above.

    white: the value that is white, where the format says; otherwise the values decide.
    """
    step = max(1, BAND // max(1, values[0].size))
    bands = [values[at : at + step] for at in range(0, len(values), step)]
    scale = _Scale(values.dtype, white)
    for band in bands:
        scale.see(band, name)
    out = np.empty(values.shape, np.uint8)
    for number, band in enumerate(bands):
        out[number * step : number * step + step] = scale.apply(band, name)
    return out


class _Scale:
    """What numbers become bytes by, once all of them have been seen, a band at a time."""

    def __init__(self, dtype: np.dtype, white: int | None):
        self.kind, self.size, self.white = dtype.kind, dtype.itemsize, white
        self.low: Any = None
        self.high: Any = None
        self.whole = True  # no finite value has a fraction

    def see(self, values: np.ndarray, name: str) -> None:
        if self.kind == "b" or (self.kind == "u" and self.size == 1):
            return
        if self.kind == "f":
            values = values[np.isfinite(values)]
            if values.size == 0:
                return
            low, high = float(values.min()), float(values.max())
            self.whole = self.whole and np.array_equal(values, np.round(values))
        else:
            low, high = int(values.min()), int(values.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def apply(self, values: np.ndarray, name: str) -> np.ndarray:
        if self.kind == "b":
            return values.astype(np.uint8) * np.uint8(255)
        if self.kind == "u" and self.size == 1:
            return values
        low, high = self.low, self.high
        if self.kind == "f":
            if low is None:
                raise PictureError(f"{name} holds no finite value, so there is nothing to see.")
            if not np.isfinite(values).all():
                values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
            if low >= 0 and high <= 1:
                return np.round(values.astype(np.float64) * 255).astype(np.uint8)
            if low >= 0 and high <= 255 and self.whole:
                return values.astype(np.uint8)
        else:
            white = self.white
            if white is None and self.kind == "u" and self.size == 2:
                white = 65535
            if white is None and low >= 0 and high <= 65535:
                white = 255 if high <= 255 else 65535
            if white is not None and low >= 0 and high <= white:
                wide = values.astype(np.uint32)
                return ((wide * 255 + white // 2) // white).astype(np.uint8)
        # In float64: the span of float32 or int64 values may overflow their own type.
        span = max(float(high) - float(low), np.finfo(np.float64).tiny)
        return np.round((values.astype(np.float64) - low) / span * 255).astype(np.uint8)


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes of whole rows, of at most `BAND` pixels each where a row has no more."""
    width, height = image.size
    step = max(1, BAND // width)
    return [(0, y, width, min(y + step, height)) for y in range(0, height, step)]


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A conversion of single pixels to RGB, without its copies of the whole."""
    boxes = _bands(image)
    if len(boxes) == 1:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _wide_to_rgb(image: Image.Image, name: str) -> Image.Image:
    tags: Any = getattr(image, "tag_v2", None) or {}
    white = None
    if image.mode.startswith("I;16"):
        # Pillow hands 12-bit samples over as they are.
        white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        white = 65535
    key = image.info.get("transparency")
    boxes = _bands(image)
    scale = _Scale(np.asarray(image.crop((0, 0, 1, 1))).dtype, white)
    for box in boxes:
        scale.see(np.asarray(image.crop(box)), name)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        values = np.asarray(image.crop(box))
        grey = scale.apply(values, name)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = 255 - grey
        if isinstance(key, int):
            grey = np.where(values == key, np.uint8(255), grey)
        rgb.paste(Image.fromarray(grey).convert("RGB"), box)
    return rgb


def _has_alpha(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return True
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in ("1", "L", "P", "RGB") and image.info.get("transparency") is not None


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # Pillow reads 16-bit RGB by its high bytes, but leaves the transparent colour 16-bit.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
