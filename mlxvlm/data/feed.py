"""Where a run's batches come from: rows and the views of their pictures, read ahead in a thread.

The thread handles files and NumPy only; whatever MLX does is done by the training thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..cache.format import plan_of
from ..cache.packed import PackedFeatures, unpack
from ..errors import DataError, PictureError, VLMError
from ..grids import Views, batched, joined
from ..images.picture import Cut, Features, Picture
from ..images.tiling import plan_cut
from .augment import Augmentation
from .batching import Batching, MicroBatch, Plan
from .buckets import Batch, Group, collate, group
from .origins import Origin, locate, read_bytes
from .packing import collate_lines
from .samples import Sample

if TYPE_CHECKING:
    from ..cache import EmbeddingCache
    from ..vision.encoder import Encoder


class Pictures:
    """Names of pictures to what the model takes: features from a cache, or pictures to encode.

    One of `encoder` and `cache` is needed: with a cache, no encoder is held. `limit` says how many
    tiles each of so many pictures of one row may have, as `images.tiling.tiles_each` does.
    `find` gives the origin of a name; by default it lies under `root`. `augment` changes the views
    of pictures in training. pixels: the encoder trains, so `views` stops short of it. Where MLX
    computes on a GPU, features come to it as their bytes on disk; a CPU does better to decode them
    in the thread that reads ahead. teacher: where the same names lead to what a teacher takes.
    """

    teacher: Pictures | None = None

    def __init__(
        self,
        encoder: Encoder | None,
        root: Path,
        cache: EmbeddingCache | None = None,
        limit: Callable[[int], int | None] = lambda among: None,
        find: Callable[[str], Origin] | None = None,
        augment: Augmentation | None = None,
        pixels: bool = False,
    ):
        self.encoder, self.root, self.cache, self.limit = encoder, root, cache, limit
        self.find = find or partial(locate, root)
        self.augment, self.pixels = augment, pixels
        self.packed = mx.default_device() == mx.gpu

    def cut(self, name: str, among: int = 1) -> Cut:
        """How one of `among` pictures of a row is cut, without reading pixels unless it must."""
        if self.cache is not None:
            return self.cache.cut(name, plan_of(self.limit(among)))
        origin = self.find(name)
        if isinstance(origin, Path) and not origin.is_file():
            what = "is no file" if origin.exists() else "does not exist"
            raise DataError(
                f"picture {origin} {what}; --images names the folder that it lies in.",
                kind="picture",
            )
        assert self.encoder is not None
        tiling = self.encoder.tiling
        if tiling.type == "single":
            return Cut(1)
        if isinstance(origin, Path):
            return plan_cut(origin, tiling, self.limit(among))
        with _reading(name, origin):
            return plan_cut(read_bytes(origin)[0], tiling, self.limit(among))

    def get(self, name: str, among: int = 1) -> Picture | Features | PackedFeatures:
        """What the model takes of one of `among` pictures of a row."""
        limit = self.limit(among)
        if self.cache is not None:
            plan = plan_of(limit)
            return self.cache.packed(name, plan) if self.packed else self.cache.get(name, plan)
        return self._look(name, limit)

    def of(self, row: Sample, time: tuple[int, int] | None = None) -> list[Any]:
        """What the model takes of a row's pictures. time: (seed, epoch), where it is for training
        and so may be augmented."""
        found: list[Any] = [self.get(name, len(row.images)) for name in row.images]
        for name, picture, cut in zip(row.images, found, row.cuts, strict=False):
            # A single view is planned without a look at the picture's size.
            if picture.cut != (cut if cut.size else cut._replace(size=picture.size)):
                raise DataError(
                    f"picture {name} has changed since its row was read: its places are for "
                    f"{cut.views} views of a picture of size {cut.size}, and it has "
                    f"{picture.cut.views} of {picture.size}.",
                    kind="picture",
                )
        if self.teacher is not None and time is not None:
            for name, one in zip(row.images, found, strict=True):
                one.taught = self.teacher.get(name)
        if self.augment is None or time is None:
            return found
        return [self.augment(one, (*time, row.where, at)) for at, one in enumerate(found)]

    def _look(self, name: str, limit: int | None) -> Picture:
        assert self.encoder is not None
        origin = self.find(name)
        if not isinstance(origin, Path):
            with _reading(name, origin):
                return self.encoder.look([read_bytes(origin)[0]], max_tiles=limit)[0]
        return self.encoder.look([origin], max_tiles=limit)[0]

    def views(self, found: Sequence[Picture | Features | PackedFeatures]) -> Views | None:
        """[views, tokens, width] features of all pictures in order; runs the encoder if it must.

        Where it trains, [views, H, W, 3] normalised pixels. Where views differ in size, a list of
        one array each.
        """
        if not found:
            return None
        # Sources with a cache and without may meet in a batch.
        parts = [self._views(kind, list(run)) for kind, run in groupby(found, type)]
        return joined(parts)

    def _views(self, kind: type, found: list[Any]) -> Views:
        if kind is PackedFeatures:
            return unpack(found)
        if kind is Features:
            views = [view for f in found for view in f.views]
            if len({view.shape for view in views}) > 1:
                return [mx.array(view) for view in views]
            return mx.array(np.stack(views))
        assert self.encoder is not None
        if self.pixels:
            return self.encoder.pixels(found)
        encoded = self.encoder.encode(found)
        return batched([view for features in encoded for view in features.views])


class Several(Pictures):
    """The pictures of several sources, for rows that say which they are from."""

    def __init__(self, encoder: Encoder | None, each: Sequence[Pictures]):
        super().__init__(encoder, Path(), pixels=each[0].pixels)
        self.each = each

    def of(self, row: Sample, time: tuple[int, int] | None = None) -> list[Any]:
        return self.each[row.source].of(row, time)


@contextmanager
def _reading(name: str, origin: Origin) -> Iterator[None]:
    """Errors that say which picture of an archive it is."""
    try:
        yield
    except (OSError, PictureError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"picture {name} ({origin}): {reason.rstrip('.')}.", kind="picture"
        ) from None


@dataclass
class Feed:
    """Endless micro-batches in an order that only their settings and the rows decide.

    strict: a picture that fails ends the run, instead of costing its own rows. loss: how labels are
    weighed, as in `label_weight`. rank, ranks: the plan's batches are for all ranks, and this feed
    gives one rank's share of each. failed: the pictures that did, and why; lost: their rows, each a
    source's number and a place in it.
    """

    samples: Sequence[Sample]
    pictures: Pictures
    batching: Batching
    share_prefix: int = 0
    strict: bool = False
    loss: str = "token"
    rank: int = 0
    ranks: int = 1
    failed: dict[str, str] = field(default_factory=dict)
    lost: dict[tuple[int, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups: list[Group] = group(self.samples, self.share_prefix)
        self.plan = Plan(self.groups, self.batching)

    def digest(self) -> str:
        """Changes with any row: its tokens, what it supervises, its pictures' names, targets."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(sample.packed())
        return found.hexdigest()

    def batches(self, epochs: float) -> float:
        """How many micro-batches so many epochs have."""
        whole = int(epochs)
        rest = (epochs - whole) * self.plan.num_batches(whole) if epochs > whole else 0
        return sum(self.plan.num_batches(number) for number in range(whole)) + rest

    def order(self, start: int) -> Iterator[tuple[MicroBatch, int]]:
        """Micro-batches, and their epoch, from the `start`-th on, epoch after epoch."""
        number = 0
        while start >= (many := self.plan.num_batches(number)):
            start -= many
            number += 1
        while True:
            yield from ((micro, number) for micro in self.plan.epoch(number)[start:])
            number, start = number + 1, 0

    def fetch(self, micro: MicroBatch, epoch: int | None = None) -> tuple[Batch | None, list[Any]]:
        """One batch and its pictures; a picture that fails costs its own rows.

        epoch: which one it is for; None is for validation, where pictures stay as they are.
        """
        time = None if epoch is None else (self.batching.seed, epoch)
        found: list[Any] = []
        # A bucket is sorted by length: taken in turn, rows of like length meet on every rank.
        mine = micro.lines[self.rank :: self.ranks]
        lines = [[g for g in line if self._read(g, found, time)] for line in mine]
        lines = [line for line in lines if line]
        return (self.collate(MicroBatch(lines, micro.length)), found) if lines else (None, [])

    def collate(self, micro: MicroBatch) -> Batch:
        """All lines of a micro-batch; no picture is looked at."""
        lines = [[self.groups[number] for number in line] for line in micro.lines]
        if micro.length:
            packed = [[row for one in line for row in one.rows] for line in lines]
            return collate_lines(packed, micro.length, self.loss)
        groups = [one for line in lines for one in line]
        return collate(groups, self.batching.length_multiple, self.loss)

    def _read(self, number: int, found: list[Any], time: tuple[int, int] | None) -> bool:
        """Adds the pictures of a group to `found`, all or none."""
        rows = self.groups[number].rows
        try:
            found += self.pictures.of(rows[0], time)
        except VLMError as error:
            if self.strict:
                raise
            self.failed[", ".join(rows[0].images)] = str(error)
            self.lost |= {(row.source, row.where): str(error) for row in rows}
            return False
        return True

    def read(
        self, start: int = 0, ahead: int = 2
    ) -> Generator[tuple[Batch | None, list[Any]], None, None]:
        """Batches from the `start`-th on, `ahead` of them being read while one is used."""
        order = self.order(start)
        with ThreadPoolExecutor(1) as pool:
            queue = [pool.submit(self.fetch, *next(order)) for _ in range(ahead)]
            try:
                while True:
                    item = queue.pop(0).result()
                    queue.append(pool.submit(self.fetch, *next(order)))
                    yield item
            finally:
                for waiting in queue:
                    waiting.cancel()

    def once(self) -> Iterator[tuple[Batch | None, list[Any]]]:
        """Every row once, for validation."""
        for micro in self.plan.epoch(0):
            yield self.fetch(micro)
