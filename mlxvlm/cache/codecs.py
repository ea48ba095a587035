"""How a view's features become bytes: float32 [tokens, width] in and out.

A codec may refuse a view by Unfit with the reason; its picture then fails, and no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CacheError

FP16_MAX = 65504.0
BF16_MAX = 3.3895313892515355e38  # bits 0x7F7F


class Unfit(ValueError):
    """Features that cannot be stored, with the reason. Costs one picture, never a run."""


class Float32:
    """Every bit of the features; 4 bytes a value."""

    name = "float32"
    dtype = "F32"
    itemsize = 4

    def encode(self, view: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(view, dtype="<f4")

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape)


class BFloat16:
    """Rounded to nearest even; 2 bytes a value, relative error below 0.4%."""

    name = "bfloat16"
    dtype = "BF16"
    itemsize = 2

    def encode(self, view: np.ndarray) -> np.ndarray:
        _within(view, BF16_MAX, "bf16")
        bits = np.ascontiguousarray(view, dtype="<f4").view("<u4")
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        # NumPy lacks bfloat16: its bits are the upper half of a float32's.
        out = np.frombuffer(data, dtype="<u2").astype("<u4")
        out <<= 16
        return out.view("<f4").reshape(shape)


class Float16:
    """2 bytes a value, relative error below 0.05%; refuses values past 65504."""

    name = "float16"
    dtype = "F16"
    itemsize = 2

    def encode(self, view: np.ndarray) -> np.ndarray:
        _within(view, FP16_MAX, "fp16")
        return np.ascontiguousarray(view).astype("<f2")

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(shape)


Codec = Float32 | BFloat16 | Float16

# The flag's name, and the name in cache.json.
CODECS: dict[str, Codec] = {"float32": Float32(), "bf16": BFloat16(), "fp16": Float16()}
NAMES: dict[str, Codec] = {codec.name: codec for codec in CODECS.values()}


def codec_named(name: Any) -> Codec:
    """A codec by its flag (`bf16`) or its name in cache.json (`bfloat16`)."""
    codec = CODECS.get(name) or NAMES.get(name)
    if codec is None:
        raise CacheError(f"codec (={name!r}) must be one of {', '.join(CODECS)}.")
    return codec


def _within(view: np.ndarray, limit: float, name: str) -> None:
    largest = float(np.abs(view).max(initial=0.0))
    if largest > limit:
        raise Unfit(
            f"its features reach {largest:.6g}, and {name} ends at {limit:.6g}: "
            "use the codec bf16 or float32"
        )
