"""What a run will take, before anything is written: pictures, views, bytes and hours.

Bytes are counted, not guessed: where every picture has one view, all that a shard holds follows
from the names. Where tiling makes several, a sample of the pictures is looked at, and `spread` says
how far the mean may be off. Hours come from real batches, encoded here.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..amount import amount
from ..config import pooled_tokens
from ..errors import CacheError
from ..images.picture import Picture
from .about import CACHE_JSON
from .codecs import CODECS, codec_named, record_size, settled
from .format import list_shards
from .index import Index
from .jobs import Job, Remaining, remaining
from .loader import Loader
from .shard import ShardWriter
from .whitening import Whitening
from .writer import settle_about

# Pictures looked at where the number of views depends on the picture, and seconds for that.
MOST_LOOKED_AT = 512
LOOKING_SECONDS = 30.0
POOLS = ("none", "mean2")


@dataclass
class Option:
    """What a codec and a pool would come to. tokens: of a view, where all are of one size."""

    codec: str
    pool: str
    tokens: int | None
    bytes: int


@dataclass
class Plan:
    """What is to be done, and what it takes.

    pictures: names to be encoded, each under its tiling plans; limited: those for rows of several
    pictures; known: names that an earlier run did. Of two names for one picture both count, since
    that is not known before it is read. spread: the relative error of
    views and bytes, 95%. encode_rate, read_rate: pictures a second of the encoder, and of the
    threads that read ahead of it; None where no batch was timed. unreadable: of the sampled.
    """

    pictures: int
    limited: int
    known: int
    views: int
    bytes: int
    spread: float
    free: int
    codec: str
    pool: str
    encode_rate: float | None = None
    read_rate: float | None = None
    sampled: int = 0
    unreadable: int = 0
    options: list[Option] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Wall time: reading hides behind encoding, or the other way round."""
        if not self.encode_rate or not self.read_rate:
            return None
        return self.pictures / min(self.encode_rate, self.read_rate)

    @property
    def too_large(self) -> bool:
        """Whether it takes more than half of the free disk."""
        return self.bytes > self.free / 2

    def refuse_if_too_large(self, folder: Path) -> None:
        """CacheError if it takes more than half of the free disk, with what would take less."""
        if not self.too_large:
            return
        less = [o for o in self.options if o.bytes < self.bytes]
        ways = ", ".join(
            f"{'--pool ' + o.pool + ' ' if o.pool != self.pool else ''}"
            f"{'--codec ' + o.codec + ' ' if o.codec != self.codec else ''}({amount(o.bytes)})"
            for o in sorted(less, key=lambda o: -o.bytes)
        )
        raise CacheError(
            f"{folder} would take {amount(self.bytes)}, more than half of the {amount(self.free)} "
            f"that are free: add --yes to go ahead, or name another disk{ways and ', or ' + ways}."
        )


def make_plan(
    encoder: Any,
    jobs: list[Job],
    folder: Path,
    codec: str,
    *,
    batch_size: int | None = None,
    shard_pictures: int | None = None,
    workers: int = 2,
    trust_names: bool = False,
    batches: int = 3,
) -> Plan:
    """Plans `write_cache` with the same arguments. jobs: as `jobs.distinct` gives them.

    batches: so many are encoded, the first only to warm up; below two no time is told.
    """
    about = settle_about(folder, encoder, codec, batch_size, shard_pictures, write=False)
    left = Remaining(jobs)
    if (folder / CACHE_JSON).exists() or list_shards(folder):
        index = Index.open(folder, about)
        try:
            left = remaining(jobs, index, trust_names)
        finally:
            index.close()
    chosen = next(flag for flag, c in CODECS.items() if c is codec_named(codec))
    new = [*left.new, *left.changed]
    plan = Plan(
        pictures=len(new),
        limited=sum(job.limit is not None for job in new),
        known=len(jobs) - len(left),
        views=0,
        bytes=0,
        spread=0.0,
        free=_free(folder),
        codec=chosen,
        pool=getattr(encoder, "pool", "none"),
    )
    if not new:
        return plan
    sample = _Sample(encoder, new, about["batch_size"], workers)
    sample.time(batches)
    if not sample.single:
        sample.look_further()
    plan.encode_rate, plan.read_rate = sample.encode_rate, sample.read_rate
    plan.sampled, plan.unreadable = sample.looked_at, sample.unreadable
    views, plan.spread = sample.mean_views()
    plan.views = round(views * len(new))
    for pool in POOLS:
        for flag, other in CODECS.items():
            shapes = sample.shapes(pool)
            if shapes is None:
                continue
            records = round(len(new) * sum(n * record_size(other, s) for s, n in shapes))
            total = records + _headers(new, folder, about, flag, views, shapes[0][0][1])
            tokens = {shape[0] for shape, _ in shapes}
            plan.options.append(
                Option(flag, pool, tokens.pop() if len(tokens) == 1 else None, total)
            )
    plan.bytes = next(o.bytes for o in plan.options if (o.codec, o.pool) == (plan.codec, plan.pool))
    return plan


class _Sample:
    """Pictures spread evenly over those to be encoded."""

    def __init__(self, encoder: Any, jobs: list[Job], batch_size: int, workers: int):
        self.encoder, self.jobs = encoder, jobs
        self.batch_size, self.workers = batch_size, workers
        self.tiling = getattr(encoder, "tiling", None)
        self.single = getattr(self.tiling, "type", None) == "single"
        self.shape_of = getattr(encoder, "shape_of", None)
        self.encode_rate: float | None = None
        self.read_rate: float | None = None
        self.unreadable = 0
        # Of each picture, the sizes of its views in pixels; and of each size, its [tokens, width].
        self.found: list[list[tuple[int, ...]]] = []
        self.known: dict[tuple[int, ...], tuple[int, int]] = {}

    @property
    def looked_at(self) -> int:
        return len(self.found) + self.unreadable

    def time(self, batches: int) -> None:
        """Encodes a few batches. With one view a picture, none is needed to know the bytes."""
        if batches < 1:
            if not self.single:
                self._look(self._spread(self.batch_size))
            return
        started = time.perf_counter()
        pictures = self._look(self._spread(batches * self.batch_size))
        reading = time.perf_counter() - started
        seconds, encoded = 0.0, 0
        for at in range(0, len(pictures), self.batch_size):
            batch = pictures[at : at + self.batch_size]
            started = time.perf_counter()
            self._encode(batch)
            if at:
                seconds += time.perf_counter() - started
                encoded += len(batch)
        if encoded:
            self.encode_rate = encoded / max(seconds, 1e-9)
            self.read_rate = self.looked_at / max(reading, 1e-9)

    def look_further(self) -> None:
        """Looks at more pictures, for how many views they have."""
        end = time.monotonic() + LOOKING_SECONDS
        jobs = self._spread(MOST_LOOKED_AT)
        self.found, self.unreadable = [], 0
        # In an order that leaves no stretch of the data out, wherever time ends it.
        order = np.random.default_rng(0).permutation(len(jobs))
        for at in range(0, len(order), self.batch_size):
            self._look([jobs[i] for i in order[at : at + self.batch_size]])
            if time.monotonic() > end:
                break

    def mean_views(self) -> tuple[float, float]:
        """(views a picture, relative error of that)."""
        counts = np.array([len(views) for views in self.found])
        if self.single or not len(counts):
            return 1.0, 0.0
        missing = 1 - len(counts) / len(self.jobs)  # none is, where all were looked at
        error = 1.96 * counts.std() / np.sqrt(len(counts)) * np.sqrt(max(missing, 0.0))
        return float(counts.mean()), float(error / counts.mean())

    def shapes(self, pool: str) -> list[tuple[tuple[int, int], float]] | None:
        """([tokens, width] of a view, how many a picture has of it); None where it cannot be told.

        pool: as if the encoder had it.
        """
        config = getattr(self.encoder, "config", None)
        ratio = 1.0
        if config is not None:
            ratio = pooled_tokens(config, pool) / self.encoder.tokens
        elif pool != getattr(self.encoder, "pool", "none"):
            return None
        if getattr(self.tiling, "varied", False) and pool != "none":
            return None
        if self.single:
            return [((round(ratio * self.encoder.tokens), self.encoder.width), 1.0)]
        counts: dict[tuple[int, int], int] = {}
        for sizes in self.found:
            for pixels in sizes:
                tokens, width = self.known[pixels]
                shape = (round(ratio * tokens), width)
                counts[shape] = counts.get(shape, 0) + 1
        return [(shape, n / max(len(self.found), 1)) for shape, n in counts.items()]

    def _spread(self, count: int) -> list[Job]:
        places = np.linspace(0, len(self.jobs) - 1, min(count, len(self.jobs)))
        return [self.jobs[i] for i in np.unique(places.round().astype(int))]

    def _look(self, jobs: list[Job]) -> list[Picture]:
        """Reads pictures as a run does."""
        loader = Loader(self.encoder, lambda *content: False, self.workers, self.batch_size)
        pictures = []
        try:
            for one in loader.load(jobs):
                if one.picture is None:
                    self.unreadable += 1
                    continue
                pictures.append(one.picture)
                self.found.append([np.shape(view) for view in one.picture.views])
        finally:
            loader.close()
        if not self.single:
            for picture in pictures:
                new = [size for view in picture.views if (size := np.shape(view)) not in self.known]
                if new and self.shape_of:
                    self.known.update((size, self.shape_of(size)) for size in new)
                elif new:
                    self._encode([picture])
        return pictures

    def _encode(self, pictures: list[Picture]) -> None:
        import mlx.core as mx

        features = self.encoder.encode(pictures)
        mx.eval([view for one in features for view in one.views])
        for picture, one in zip(pictures, features, strict=True):
            for view, found in zip(picture.views, one.views, strict=True):
                self.known[np.shape(view)] = (found.shape[0], found.shape[1])


def _headers(
    jobs: list[Job], folder: Path, about: dict[str, Any], flag: str, views: float, width: int
) -> int:
    codec = codec_named(flag)
    about = {**about, "codec": codec.name}
    if codec.whitened:  # any numbers: their decimals take the room that a calibration's do
        x = np.random.default_rng(0).uniform(0.1, 1, width).astype(np.float32)
        codec = settled(codec, Whitening(-x, x))
    step = about["shard_pictures"]
    total = 0
    for number, start in enumerate(range(0, len(jobs), step)):
        names = [job.name for job in jobs[start : start + step]]
        total += ShardWriter(folder, number, about, codec, names).room(round(views))
    return total


def _free(folder: Path) -> int:
    """Free bytes of the disk that `folder` is, or will be, on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
