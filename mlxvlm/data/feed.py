"""Where a run's batches come from: rows and the views of their pictures, read ahead in a thread.

The thread handles files and NumPy only; whatever MLX does is done by the training thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import CacheError, DataError, VLMError
from ..images.picture import Features, Picture
from .buckets import Batch, Group, collate, epoch, group
from .samples import Sample

if TYPE_CHECKING:
    from ..cache import EmbeddingCache
    from ..vision.encoder import Encoder


class Pictures:
    """Names of pictures to what the model takes: features from a cache, or pictures to encode.

    One of `encoder` and `cache` is needed: with a cache, no encoder is held.
    """

    def __init__(self, encoder: Encoder | None, root: Path, cache: EmbeddingCache | None = None):
        self.encoder, self.root, self.cache = encoder, root, cache

    def count_views(self, name: str) -> int:
        """Views of a picture, without reading its pixels where that is not needed."""
        if self.cache is not None:
            if name not in self.cache:
                raise CacheError(
                    f"picture {name!r} is not in the cache; add it with mlxvlm cache-embeddings."
                )
            return self.cache.num_views(name)
        path = self.root / name
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise DataError(f"picture {path} {what}; --images names the folder that it lies in.")
        assert self.encoder is not None
        return 1 if self.encoder.tiling.type == "single" else len(self.get(name).views)

    def get(self, name: str) -> Picture | Features:
        if self.cache is not None:
            return self.cache[name]
        assert self.encoder is not None
        return self.encoder.look([self.root / name])[0]

    def views(self, found: Sequence[Picture | Features]) -> mx.array | None:
        """[views, tokens, width] features of all pictures in order; runs the encoder if it must."""
        if not found:
            return None
        if isinstance(found[0], Features):
            return mx.array(np.concatenate([np.stack(f.views) for f in found]))
        assert self.encoder is not None
        encoded = self.encoder.encode([p for p in found if isinstance(p, Picture)])
        return mx.stack([view for features in encoded for view in features.views])


@dataclass
class Feed:
    """Endless micro-batches in an order that only `seed` and the rows decide.

    strict: a picture that fails ends the run, instead of costing its own rows.
    """

    samples: Sequence[Sample]
    pictures: Pictures
    batch_size: int
    length_multiple: int = 32
    share_prefix: int = 0
    seed: int = 0
    strict: bool = False
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups: list[Group] = group(self.samples, self.share_prefix)
        self.batches_per_epoch = len(self._epoch(0))

    def digest(self) -> str:
        """Changes with any row: its tokens, what it supervises, its pictures' names, targets."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(sample.packed())
        return found.hexdigest()

    def _epoch(self, number: int) -> list[list[int]]:
        return epoch(self.groups, self.batch_size, self.length_multiple, self.seed, number)

    def order(self, start: int) -> Iterator[list[int]]:
        """Batches (of group indices) from the `start`-th on, epoch after epoch."""
        number, skip = divmod(start, self.batches_per_epoch)
        while True:
            yield from self._epoch(number)[skip:]
            number, skip = number + 1, 0

    def fetch(self, indices: list[int]) -> tuple[Batch | None, list[Any]]:
        """One batch and its pictures; a picture that fails costs its own rows."""
        kept: list[Group] = []
        found: list[Any] = []
        for index in indices:
            one = self.groups[index]
            try:
                pictures = [self.pictures.get(name) for name in one.rows[0].images]
            except VLMError as error:
                if self.strict:
                    raise
                self.failed[", ".join(one.rows[0].images)] = str(error)
                continue
            kept.append(one)
            found += pictures
        return (collate(kept, self.length_multiple) if kept else None), found

    def read(
        self, start: int = 0, ahead: int = 2
    ) -> Generator[tuple[Batch | None, list[Any]], None, None]:
        """Batches from the `start`-th on, `ahead` of them being read while one is used."""
        order = self.order(start)
        with ThreadPoolExecutor(1) as pool:
            queue = [pool.submit(self.fetch, next(order)) for _ in range(ahead)]
            try:
                while True:
                    item = queue.pop(0).result()
                    queue.append(pool.submit(self.fetch, next(order)))
                    yield item
            finally:
                for waiting in queue:
                    waiting.cancel()

    def once(self) -> Iterator[tuple[Batch | None, list[Any]]]:
        """Every row once, for validation."""
        for indices in self._epoch(0):
            yield self.fetch(indices)
