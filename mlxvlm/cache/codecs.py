"""How a view's features become bytes: float32 [tokens, width] in and out.

A codec may refuse a view by Unfit with the reason; its picture then fails, and no other. `encode`
and `decode` are NumPy's; `unpack` gives MLX the bytes of several views as they are, to decode where
it computes, and belongs to the thread that owns MLX.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError
from .quantised import Int4, Int8, Part, from_bf16, to_bf16
from .whitening import Unfit, Whitening

if TYPE_CHECKING:
    import mlx.core as mx

FP16_MAX = 65504.0
BF16_MAX = 3.3895313892515355e38  # bits 0x7F7F


class _Float:
    """A value as itself, in some width."""

    name: str
    dtype: str
    itemsize: int
    whitened = False
    whitening: Whitening | None = None

    def parts(self, shape: tuple[int, int]) -> list[Part]:
        """What a record of this shape is made of, in order."""
        return [("", self.dtype, shape, self.itemsize * shape[0] * shape[1])]


class Float32(_Float):
    """Every bit of the features; 4 bytes a value."""

    name = "float32"
    dtype = "F32"
    itemsize = 4

    def encode(self, view: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(view, dtype="<f4")

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape)

    def unpack(self, records: list[bytes], shape: tuple[int, int]) -> mx.array:
        return _stack(records, "<f4", shape)


class BFloat16(_Float):
    """Rounded to nearest even; 2 bytes a value, relative error below 0.4%."""

    name = "bfloat16"
    dtype = "BF16"
    itemsize = 2

    def encode(self, view: np.ndarray) -> np.ndarray:
        _within(view, BF16_MAX, "bf16")
        return to_bf16(view)

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return from_bf16(np.frombuffer(data, dtype="<u2")).reshape(shape)

    def unpack(self, records: list[bytes], shape: tuple[int, int]) -> mx.array:
        import mlx.core as mx

        return _stack(records, "<u2", shape).view(mx.bfloat16)


class Float16(_Float):
    """2 bytes a value, relative error below 0.05%; refuses values past 65504."""

    name = "float16"
    dtype = "F16"
    itemsize = 2

    def encode(self, view: np.ndarray) -> np.ndarray:
        _within(view, FP16_MAX, "fp16")
        return np.ascontiguousarray(view).astype("<f2")

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(shape)

    def unpack(self, records: list[bytes], shape: tuple[int, int]) -> mx.array:
        return _stack(records, "<f2", shape)


Codec = Float32 | BFloat16 | Float16 | Int8 | Int4

# The flag's name, and the name in cache.json.
CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "bf16": BFloat16(),
    "fp16": Float16(),
    "int8": Int8(),
    "int4": Int4(),
}
NAMES: dict[str, Codec] = {codec.name: codec for codec in CODECS.values()}


def codec_named(name: Any) -> Codec:
    """A codec by its flag (`bf16`) or its name in cache.json (`bfloat16`)."""
    codec = CODECS.get(name) or NAMES.get(name)
    if codec is None:
        raise CacheError(f"codec (={name!r}) must be one of {', '.join(CODECS)}.")
    return codec


def settled(codec: Codec, whitening: Whitening) -> Codec:
    """An int8 or int4 with its mean and scale; the others need none."""
    return type(codec)(whitening) if isinstance(codec, Int8 | Int4) else codec


def record_size(codec: Codec, shape: tuple[int, int]) -> int:
    """Bytes of a view's record."""
    return sum(size for *_, size in codec.parts(shape))


def describe_codec(codec: Codec) -> dict[str, Any]:
    """What a shard says of its codec: all that is needed to decode its records."""
    return {"name": codec.name, **(codec.whitening.to_json() if codec.whitening else {})}


@lru_cache(maxsize=256)
def described_codec(text: str) -> Codec:
    """The codec that a shard describes. Shards that say the same share one."""
    found = json.loads(text)
    codec = codec_named(found["name"])
    if codec.whitened and "mean" in found:
        return settled(codec, Whitening.from_json(found))
    return codec


def _within(view: np.ndarray, limit: float, name: str) -> None:
    largest = float(np.abs(view).max(initial=0.0))
    if largest > limit:
        raise Unfit(
            f"its features reach {largest:.6g}, and {name} ends at {limit:.6g}: "
            "use the codec bf16 or float32"
        )


def _stack(records: list[bytes], dtype: str, shape: tuple[int, int]) -> mx.array:
    import mlx.core as mx

    return mx.stack([mx.array(np.frombuffer(data, dtype).reshape(shape)) for data in records])
