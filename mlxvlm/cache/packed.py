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

    from ..grids import Views


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


def unpack(found: Sequence[PackedFeatures]) -> Views:
    """[views, tokens, width] of all views of all pictures in order, decoded by MLX; lazy. A list of
    [tokens, width] where views differ in shape.

    bf16 stays bf16; int8 and int4 become float32. Only the thread that owns MLX may call it.
    """
    from ..grids import joined

    parts: list[Views] = []
    start = 0
    while start < len(found):
        # Neighbours from one shard, or from shards with one calibration, are decoded at once.
        codec, stop = found[start].codec, start
        records: list[bytes] = []
        shapes: list[tuple[int, int]] = []
        while stop < len(found) and found[stop].codec is codec:
            records += found[stop].records
            shapes += found[stop].shapes
            stop += 1
        if records:
            parts.append(_unpack(codec, records, shapes))
        start = stop
    return joined(parts)


def _unpack(codec: Codec, records: list[bytes], shapes: list[tuple[int, int]]) -> Views:
    different = dict.fromkeys(shapes)
    if len(different) == 1:
        return codec.unpack(records, shapes[0])
    views: dict[int, mx.array] = {}
    for shape in different:
        places = [place for place, other in enumerate(shapes) if other == shape]
        decoded = codec.unpack([records[place] for place in places], shape)
        views.update((place, decoded[row]) for row, place in enumerate(places))
    return [views[place] for place in range(len(records))]
