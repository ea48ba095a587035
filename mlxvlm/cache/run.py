"""One run of a writer: pictures in, shards out.

The names that no shard accounts for yet are cut, in their order, into stretches of
`shard_pictures`; each stretch becomes one shard, and within it each `batch_size` new pictures one
batch. Both depend on the input list alone, never on time or threads, so that a resumed cache is
byte-identical to an uninterrupted one:

    finished shards | stretch | stretch | ... | names that failed in an earlier run
                      ^ an interrupted one is done again whole

A picture whose content is in an earlier shard is only named. One that cannot be read, or whose
features cannot be stored, costs itself: its shard names it with the reason.

This thread owns MLX, and keeps two batches with it: one being computed, one that waits, so that the
encoder never does. Others read, hash and tile ahead of it with NumPy; one more encodes, writes and
syncs behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.origins import Origin, state_of
from ..errors import CacheError
from ..images.picture import Features, Picture
from .behind import Behind
from .codecs import Codec, codec_named, settled
from .format import PLAN, SHARDS, Source, list_shards, plan_of, read_header
from .index import Index, IndexDamaged
from .loader import Loaded, Loader
from .shard import ShardWriter
from .whitening import Unfit, Whitening

Reporter = Callable[["Summary"], None]
Job = tuple[str, Origin]  # a name, and where its picture is


@dataclass
class Summary:
    """How a run stands, and what it came to.

    total: distinct names in the input; known: those an earlier run had done; encoded, duplicates,
    failures: those of this run; views and bytes: what this run stored.
    """

    total: int = 0
    known: int = 0
    encoded: int = 0
    duplicates: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    views: int = 0
    bytes: int = 0
    shards: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Names accounted for."""
        return self.known + self.encoded + self.duplicates + len(self.failures)


class Run:
    """Carries a list of (name, origin) into the shards of a folder. Needs the writer's lock.

    trust_names: a name that the cache knows is not looked at again, changed or not.
    max_tiles: the limit of the tiling plan that all of the list is cached under.
    elsewhere: contents that an earlier part of the input has; they are only named here.
    mending: damaged shards are there, and are passed over.
    whitening: of int8 and int4, where no shard has one yet; otherwise the first shard's own.
    """

    def __init__(
        self,
        encoder: Any,
        folder: Path,
        about: dict[str, Any],
        summary: Summary,
        workers: int,
        progress: Reporter | None,
        trust_names: bool = False,
        max_tiles: int | None = None,
        elsewhere: Set[str] = frozenset(),
        mending: bool = False,
        whitening: Whitening | None = None,
    ):
        self.encoder = encoder
        self.folder = folder
        self.about = about
        self.codec = _codec_of(folder, about, whitening)
        self.batch_size: int = about["batch_size"]
        self.shard_pictures: int = about["shard_pictures"]
        self.progress = progress
        self.trust_names = trust_names
        self.summary = summary
        self.plan = plan_of(max_tiles)
        self.elsewhere = elsewhere
        self.index = open_sound(folder, about, mending)
        self.loader = Loader(
            encoder, self._known, workers, depth=2 * self.batch_size + workers, max_tiles=max_tiles
        )
        self.claimed: set[str] = set()  # contents on their way into a shard that is not finished
        self.failed: dict[str, str] = {}  # contents that could not be stored, and why
        self.shard: ShardWriter | None = None  # the one being written
        self.number = max(list_shards(folder), default=-1) + 1
        self.behind = Behind()
        self.computing: deque[_Batch] = deque()
        self.started = time.monotonic()

    def run(self, jobs: list[Job]) -> None:
        new, failed = remaining(jobs, self.index, self.trust_names, self._stored)
        self.summary.known = len(jobs) - len(new) - len(failed)
        loaded = self.loader.load(chain(new, failed))
        for some, retry in ((new, False), (failed, True)):
            for start in range(0, len(some), self.shard_pictures):
                self._stretch(some[start : start + self.shard_pictures], retry, loaded)
        self._collect()
        self.behind.wait()
        if self.summary.shards:
            self.index.seal()
        self._report()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.close()
        self.behind.close()
        if self.shard:
            self.shard.abandon()
        self.index.close()

    def _stretch(self, part: list[Job], retry: bool, loaded: Iterator[Loaded]) -> None:
        stretch = _Stretch([name for name, _ in part], retry)
        batch: list[Picture] = []
        for one in islice(loaded, len(part)):
            source = one.source
            stretch.sources.append(source)
            if source.sha256 is None or source.sha256 in self.failed or self._known(source.sha256):
                continue  # `_finish` sees what became of it
            if source.sha256 in self.elsewhere:
                continue  # looked at all the same: a picture that cannot be read fails here too
            assert one.picture is not None
            self.claimed.add(source.sha256)
            batch.append(one.picture)
            if len(batch) == self.batch_size:
                self._launch(stretch, batch)
                batch = []
        if batch:
            self._launch(stretch, batch)
        if self.computing:
            self.computing[-1].ends.append(stretch)
        else:
            self.behind.do(lambda: self._finish(stretch))

    def _launch(self, stretch: _Stretch, pictures: list[Picture]) -> None:
        import mlx.core as mx

        features = self.encoder.encode(pictures)
        for one in features:
            # Cast now: later it would wait for the batches that are launched meanwhile.
            one.views = [v.astype(mx.float32) for v in one.views]
        mx.async_eval([view for one in features for view in one.views])
        self.computing.append(_Batch(stretch, pictures, features))
        self._collect(keep=1)

    def _collect(self, keep: int = 0) -> None:
        """Passes on what has been computed, and waits for it, until `keep` batches are left."""
        import mlx.core as mx

        while len(self.computing) > keep:
            batch = self.computing[0]
            mx.eval([view for one in batch.features for view in one.views])
            views = [[np.array(view) for view in one.views] for one in batch.features]
            self.computing.popleft()
            self.behind.do(lambda batch=batch, views=views: self._write(batch, views))
            for stretch in batch.ends:
                self.behind.do(lambda stretch=stretch: self._finish(stretch))
            self._report()

    # Behind: what follows runs in the writing thread, in order

    def _write(self, batch: _Batch, views: list[list[np.ndarray]]) -> None:
        shard = self._shard_of(batch.stretch)
        for picture, found in zip(batch.pictures, views, strict=True):
            assert picture.sha256 is not None
            try:
                size = shard.add(picture, [host(view) for view in found], self.plan)
            except Unfit as error:
                self.failed[picture.sha256] = str(error)
                continue
            self.summary.encoded += 1
            self.summary.views += len(found)
            self.summary.bytes += size

    def _finish(self, stretch: _Stretch) -> None:
        for source in stretch.sources:
            if source.sha256 in self.failed:
                source.reason, source.sha256 = self.failed[source.sha256], None
            if source.sha256 is None:
                self.summary.failures.append((source.name, source.reason))
        named = [source for source in stretch.sources if source.sha256]
        if stretch.retry or self.plan != PLAN:
            if not named:
                self.shard = None  # they fail as an earlier shard says: nothing new to keep
                return
            stretch.sources = named
        shard = self._shard_of(stretch)
        shard.finish(stretch.sources)
        self.codec = shard.codec  # calibrated, if it had not been
        self.index.add(self.number)
        self.claimed -= {row.sha256 for row in shard.rows}
        self.summary.duplicates += len(named) - len(shard.rows)
        self.summary.shards += 1
        self.number += 1
        self.shard = None

    def _shard_of(self, stretch: _Stretch) -> ShardWriter:
        # Batches are written in order, so that there is never more than one.
        if self.shard is None:
            self.shard = ShardWriter(
                self.folder, self.number, self.about, self.codec, stretch.names
            )
        return self.shard

    def _known(self, sha256: str) -> bool:
        return sha256 in self.claimed or self.index.has(sha256, self.plan)

    def _stored(self, sha256: str) -> bool:
        return self.index.has(sha256, self.plan) or sha256 in self.elsewhere

    def _report(self) -> None:
        self.summary.seconds = time.monotonic() - self.started
        if self.progress:
            self.progress(self.summary)


@dataclass
class _Stretch:
    """A part of the input on its way into one shard."""

    names: list[str]
    retry: bool
    sources: list[Source] = field(default_factory=list)


@dataclass
class _Batch:
    """Pictures whose features are being computed. ends: stretches to finish after it."""

    stretch: _Stretch
    pictures: list[Picture]
    features: list[Features]
    ends: list[_Stretch] = field(default_factory=list)


def host(view: Any) -> np.ndarray:
    """Features as float32 on the host; Unfit where they are not finite."""
    if not isinstance(view, np.ndarray):
        import mlx.core as mx

        view = np.array(view.astype(mx.float32))
    if not np.isfinite(view).all():
        raise Unfit("the encoder's features of it are not finite")
    return view


def remaining(
    jobs: list[Job],
    index: Index,
    trust_names: bool,
    stored: Callable[[str], bool] | None = None,
) -> tuple[list[Job], list[Job]]:
    """Jobs that no shard accounts for, and those that failed before and may do better.

    stored: whether a content needs no encoding; by default, whether the index has it.
    """
    stored = stored or index.has
    new, failed = [], []
    for job in jobs:
        known = index.name(job[0])
        if known is None:
            new.append(job)
        elif known.sha256 is None:
            failed.append(job)
        elif not stored(known.sha256) or (not trust_names and _changed(known, job[1])):
            new.append(job)
    return new, failed


def _codec_of(folder: Path, about: dict[str, Any], whitening: Whitening | None) -> Codec:
    """The cache's codec, calibrated as in its first shard that is, else as given, else not yet."""
    codec = codec_named(about["codec"])
    if codec.whitened:
        for name in list_shards(folder).values():
            found = read_header(folder / SHARDS / name).codec
            if found.whitening:
                return found
    return settled(codec, whitening) if whitening else codec


def _changed(known: Source, origin: Origin) -> bool:
    """Whether the file is another one now; names outlive the files they came from."""
    try:
        return state_of(origin) != (known.size, known.mtime_ns)
    except OSError:
        return False


def open_sound(folder: Path, about: dict[str, Any], mending: bool = False) -> Index:
    """An index to rely on: checked whole, and without damaged shards unless they are mended."""
    index = Index.open_for_writing(folder, about)
    try:
        try:
            index.check()
        except IndexDamaged:
            index.close()
            index = Index.open_for_writing(folder, about, distrust=True)
        problems = {} if mending else index.problems()
    except BaseException:
        index.close()
        raise
    if problems:
        index.close()
        raise CacheError("\n".join(problems.values()))
    return index
