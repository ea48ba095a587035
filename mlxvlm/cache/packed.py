"""Features as their bytes on disk, which a device decodes faster than a host copies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..images.picture import Cut
from .codecs import Codec

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass
class PackedFeatures:
    """What a cache holds of one picture. Any thread may make it and pass it on.

    records, shapes: of each view; shape: (tokens, width). The rest as in Features.
    """

    codec: Codec
    records: list[bytes]
    shapes: list[tuple[int, int]]
    grid: tuple[int, int]
    size: tuple[int, int] | None
    sha256: str

    @property
    def cut(self) -> Cut:
        return Cut(len(self.records), self.grid, self.size)

    def decode(self) -> list[np.ndarray]:
        """float32 [tokens, width] of each view, by NumPy."""
        pairs = zip(self.records, self.shapes, strict=True)
        return [self.codec.decode(record, shape) for record, shape in pairs]


def unpack(found: Sequence[PackedFeatures]) -> mx.array:
    """[views, tokens, width] of all views of all pictures in order, decoded by MLX; lazy.

    The views must agree in shape. bf16 stays bf16; int8 and int4 become float32. Only the thread
    that owns MLX may call it.
    """
    import mlx.core as mx

    parts: list[mx.array] = []
    start = 0
    while start < len(found):
        # Neighbours from one shard, or from shards with one calibration, are decoded at once.
        codec, records, stop = found[start].codec, [], start
        while stop < len(found) and found[stop].codec is codec:
            records += found[stop].records
            stop += 1
        if records:
            shape = next(shape for one in found[start:stop] for shape in one.shapes)
            parts.append(codec.unpack(records, shape))
        start = stop
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
