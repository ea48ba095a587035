"""int8 and int4: features whitened channel by channel, then rounded to few bits.

    int8   x = q * token's scale * channel's scale + channel's mean     q: int8
    int4   x = (q * group's scale + group's bias) * channel's scale + channel's mean
           q: 0 to 15, two a byte, the even channel low, as MLX packs them; groups of 64 channels of
           one token, a last short one filled up with zeros; scale and bias are bf16

A record is the scales (and biases) and then q. Nothing is clipped: values far from those of the
calibration widen the step of their token or group alone.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .whitening import Unfit, Whitening, check_range, check_width

if TYPE_CHECKING:
    import mlx.core as mx

GROUP = 64
_ROWS = 64  # tokens at a time, which stay in a core's own cache
_LEAST = 1e-30  # whitened values below it are zero

# A part of a record: what to add to its tensor's name, dtype in safetensors, shape, bytes.
Part = tuple[str, str, tuple[int, ...], int]


class Int8:
    """1 byte a value and 4 a token; relative error below 1%. Needs a Whitening to do anything."""

    name = "int8"
    whitened = True

    def __init__(self, whitening: Whitening | None = None):
        self.whitening = whitening

    def parts(self, shape: tuple[int, int]) -> list[Part]:
        tokens, width = shape
        return [(".scale", "F32", (tokens,), 4 * tokens), ("", "I8", shape, tokens * width)]

    def encode(self, view: np.ndarray) -> np.ndarray:
        """The record of a view as uint8."""
        tokens, width = view.shape
        whitening = _checked(self.whitening, view)
        inverse = 1 / whitening.scale
        record = np.empty(4 * tokens + tokens * width, np.uint8)
        scales = record[: 4 * tokens].view("<f4")
        q = record[4 * tokens :].view(np.int8).reshape(tokens, width)
        for i in range(0, tokens, _ROWS):
            x = view[i : i + _ROWS] - whitening.mean
            with np.errstate(over="ignore"):
                x *= inverse
            largest = np.maximum(x.max(axis=1), -x.min(axis=1))
            _check_finite(largest)
            largest[largest < _LEAST] = 0
            scales[i : i + _ROWS] = largest / 127
            x *= np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)[:, None]
            np.rint(x, out=x)
            q[i : i + _ROWS] = x
        return record

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        whitening = _fitting(self.whitening, shape)
        scales, q = self._split(data, shape)
        out = np.empty(shape, np.float32)
        for i in range(0, shape[0], _ROWS):
            x = out[i : i + _ROWS]
            x[:] = q[i : i + _ROWS]
            x *= scales[i : i + _ROWS, None]
            x *= whitening.scale
            x += whitening.mean
        return out

    def unpack(self, records: list[bytes], shape: tuple[int, int]) -> mx.array:
        """[len(records), tokens, width], dequantised by MLX where its default device is."""
        import mlx.core as mx

        whitening = _fitting(self.whitening, shape)
        split = [self._split(data, shape) for data in records]
        scales = mx.array(np.stack([s for s, _ in split]))
        q = mx.stack([mx.array(q) for _, q in split])
        return _int8_graph()(q, scales, mx.array(whitening.scale), mx.array(whitening.mean))

    @staticmethod
    def _split(data: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        scales = np.frombuffer(data, "<f4", shape[0])
        return scales, np.frombuffer(data, np.int8, offset=4 * shape[0]).reshape(shape)


class Int4:
    """A little over half a byte a value; relative error near 9%. Needs a Whitening."""

    name = "int4"
    whitened = True

    def __init__(self, whitening: Whitening | None = None):
        self.whitening = whitening

    def parts(self, shape: tuple[int, int]) -> list[Part]:
        tokens, groups = shape[0], -(-shape[1] // GROUP)
        size = 2 * tokens * groups
        half = (tokens, groups * GROUP // 2)
        return [
            (".scale", "BF16", (tokens, groups), size),
            (".bias", "BF16", (tokens, groups), size),
            ("", "U8", half, half[0] * half[1]),
        ]

    def encode(self, view: np.ndarray) -> np.ndarray:
        """The record of a view as uint8."""
        tokens, width = view.shape
        whitening = _checked(self.whitening, view)
        inverse = 1 / whitening.scale
        groups = -(-width // GROUP)
        size = 2 * tokens * groups
        record = np.empty(2 * size + tokens * groups * GROUP // 2, np.uint8)
        scales = record[:size].view("<u2").reshape(tokens, groups)
        biases = record[size : 2 * size].view("<u2").reshape(tokens, groups)
        packed = record[2 * size :].reshape(tokens, groups * GROUP // 2)
        for i in range(0, tokens, _ROWS):
            rows = view[i : i + _ROWS]
            x = np.zeros((len(rows), groups * GROUP), np.float32)
            np.subtract(rows, whitening.mean, out=x[:, :width])
            with np.errstate(over="ignore"):
                x[:, :width] *= inverse
            x = x.reshape(len(rows), groups, GROUP)
            low = x.min(axis=2)
            with np.errstate(over="ignore", invalid="ignore"):
                span = x.max(axis=2) - low
            _check_finite(span)
            span[span < _LEAST] = 0
            # Rounded first, so that q makes up for their rounding.
            bits = scales[i : i + _ROWS] = to_bf16(span / 15)
            step = from_bf16(bits)
            bits = biases[i : i + _ROWS] = to_bf16(low)
            x -= from_bf16(bits)[..., None]
            x *= np.divide(1, step, out=np.zeros_like(step), where=step > 0)[..., None]
            np.rint(x, out=x)
            np.clip(x, 0, 15, out=x)
            q = x.astype(np.uint8).reshape(len(rows), -1)
            packed[i : i + _ROWS] = q[:, ::2] | (q[:, 1::2] << 4)
        return record

    def decode(self, data: bytes, shape: tuple[int, int]) -> np.ndarray:
        whitening = _fitting(self.whitening, shape)
        tokens, width = shape
        scales, biases, packed = self._split(data, shape)
        groups = scales.shape[1]
        out = np.empty(shape, np.float32)
        for i in range(0, tokens, _ROWS):
            pairs = packed[i : i + _ROWS]
            x = np.empty((len(pairs), groups * GROUP), np.float32)
            x[:, ::2] = pairs & 15
            x[:, 1::2] = pairs >> 4
            grouped = x.reshape(len(pairs), groups, GROUP)
            grouped *= from_bf16(scales[i : i + _ROWS])[..., None]
            grouped += from_bf16(biases[i : i + _ROWS])[..., None]
            np.multiply(x[:, :width], whitening.scale, out=out[i : i + _ROWS])
        out += whitening.mean
        return out

    def unpack(self, records: list[bytes], shape: tuple[int, int]) -> mx.array:
        """[len(records), tokens, width], dequantised by MLX where its default device is."""
        import mlx.core as mx

        whitening = _fitting(self.whitening, shape)
        split = [self._split(data, shape) for data in records]
        scales, biases = (
            mx.array(np.stack([s[k] for s in split])).view(mx.bfloat16).astype(mx.float32)
            for k in (0, 1)
        )
        packed = mx.stack([mx.array(s[2].view("<u4")) for s in split])
        x = mx.dequantize(packed, scales, biases, group_size=GROUP, bits=4)
        return x[..., : shape[1]] * mx.array(whitening.scale) + mx.array(whitening.mean)

    @staticmethod
    def _split(data: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, groups = shape[0], -(-shape[1] // GROUP)
        count = tokens * groups
        scales = np.frombuffer(data, "<u2", count).reshape(tokens, groups)
        biases = np.frombuffer(data, "<u2", count, offset=2 * count).reshape(tokens, groups)
        packed = np.frombuffer(data, np.uint8, offset=4 * count)
        return scales, biases, packed.reshape(tokens, groups * GROUP // 2)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 of float32, ties to even, as uint16. NumPy has no bfloat16."""
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bf16's bits, which are the upper half of it."""
    out = bits.astype("<u4")
    out <<= 16
    return out.view("<f4")


@cache
def _int8_graph() -> Any:
    import mlx.core as mx

    @mx.compile
    def dequantise(q: mx.array, scales: mx.array, scale: mx.array, mean: mx.array) -> mx.array:
        return q.astype(mx.float32) * scales[..., None] * scale + mean

    return dequantise


def _checked(whitening: Whitening | None, view: np.ndarray) -> Whitening:
    check_range(view)
    return _fitting(whitening, view.shape)


def _fitting(whitening: Whitening | None, shape: tuple[int, ...]) -> Whitening:
    if whitening is None:
        raise ValueError("int8 and int4 need the mean and scale of their shard")
    check_width(shape, len(whitening.mean))
    return whitening


def _check_finite(whitened: np.ndarray) -> None:
    if not np.isfinite(whitened).all():
        raise Unfit(
            "its features lie too far from those that the codec was calibrated on: "
            "use the codec bf16 or float32"
        )
