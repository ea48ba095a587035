"""One run of a writer: pictures in, shards out.

The names that no shard accounts for yet are cut, in their order, into stretches of
`shard_pictures`; each stretch becomes one shard, and within it each `batch_size` new pictures one
batch, or fewer if they have many views. Both depend on the input alone, never on time or threads,
so that a resumed cache is byte-identical to an uninterrupted one:

    finished shards | stretch | stretch | ... | names that changed, or failed in an earlier run
                      ^ an interrupted one is done again whole

A name is taken once for each tiling plan that its rows ask for, as `jobs` has it.

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

from ..images.picture import Features, Picture
from .behind import Behind
from .codecs import Codec, codec_named, settled
from .format import SHARDS, Source, list_shards, read_header
from .index import Index
from .jobs import Job, is_full, remaining
from .loader import Loaded, Loader
from .shard import ShardWriter
from .whitening import Unfit, Whitening

Reporter = Callable[["Summary"], None]


@dataclass
class Summary:
    """How a run stands, and what it came to.

    total: jobs, which are distinct names in the input, each as often as it has tiling plans;
    limited: those of them that are for rows of several pictures; known: those an earlier run had
    done; encoded, duplicates, failures: those of this run; views and bytes: what this run stored.
    """

    total: int = 0
    limited: int = 0
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
        """Jobs accounted for."""
        return self.known + self.encoded + self.duplicates + len(self.failures)


class Run:
    """Carries a list of jobs into the shards of a folder. Needs the writer's lock.

    trust_names: a name that the cache knows is not looked at again, changed or not.
    elsewhere: (content, plan) that an earlier part of the input has; they are only named here.
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
        elsewhere: Set[tuple[str, str]] = frozenset(),
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
        self.elsewhere = elsewhere
        self.index = Index.open_sound(folder, about, mending)
        self.loader = Loader(encoder, self._known, workers, depth=2 * self.batch_size + workers)
        # (content, plan): on their way into a shard that is not finished; not to be stored, and why
        self.claimed: set[tuple[str, str]] = set()
        self.failed: dict[tuple[str | None, str], str] = {}
        self.shard: ShardWriter | None = None  # the one being written
        self.number = max(list_shards(folder), default=-1) + 1
        self.behind = Behind()
        self.computing: deque[_Batch] = deque()
        self.started = time.monotonic()

    def run(self, jobs: list[Job]) -> None:
        left = remaining(jobs, self.index, self.trust_names, self._stored)
        self.summary.known = len(jobs) - len(left)
        again = [*left.changed, *left.failed]
        loaded = self.loader.load(chain(left.new, again))
        for some, retry in ((left.new, False), (again, True)):
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
        stretch = _Stretch([job.name for job in part], retry)
        batch: list[Picture] = []
        plans: list[str] = []
        views = 0
        for one in islice(loaded, len(part)):
            source = one.source
            stretch.sources.append(source)
            if source.sha256 is None:
                continue
            content = source.sha256, source.plan
            if content in self.failed or self._known(*content):
                continue  # `_finish` sees what became of it
            if content in self.elsewhere:
                continue  # looked at all the same: a picture that cannot be read fails here too
            assert one.picture is not None
            self.claimed.add(content)
            batch.append(one.picture)
            plans.append(source.plan)
            views += len(one.picture.views)
            if is_full(len(batch), views, self.batch_size):
                self._launch(stretch, batch, plans)
                batch, plans, views = [], [], 0
        if batch:
            self._launch(stretch, batch, plans)
        if self.computing:
            self.computing[-1].ends.append(stretch)
        else:
            self.behind.do(lambda: self._finish(stretch))

    def _launch(self, stretch: _Stretch, pictures: list[Picture], plans: list[str]) -> None:
        import mlx.core as mx

        features = self.encoder.encode(pictures)
        for one in features:
            # Cast now: later it would wait for the batches that are launched meanwhile.
            one.views = [v.astype(mx.float32) for v in one.views]
        mx.async_eval([view for one in features for view in one.views])
        self.computing.append(_Batch(stretch, pictures, plans, features))
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
        for picture, plan, found in zip(batch.pictures, batch.plans, views, strict=True):
            try:
                size = shard.add(picture, [host(view) for view in found], plan)
            except Unfit as error:
                self.failed[picture.sha256, plan] = str(error)
                continue
            self.summary.encoded += 1
            self.summary.views += len(found)
            self.summary.bytes += size

    def _finish(self, stretch: _Stretch) -> None:
        for source in stretch.sources:
            if (source.sha256, source.plan) in self.failed:
                source.reason = self.failed[source.sha256, source.plan]
                source.sha256 = None
            if source.sha256 is None:
                self.summary.failures.append((source.name, source.reason))
        named = [source for source in stretch.sources if source.sha256]
        if stretch.retry:
            if not named:
                self.shard = None  # they failed before, or an earlier shard has what they were
                return
            stretch.sources = named
        shard = self._shard_of(stretch)
        path = shard.finish(stretch.sources)
        records = sum(view.size for row in shard.rows for view in row.views)
        self.summary.bytes += path.stat().st_size - records  # what is around them
        self.codec = shard.codec  # calibrated, if it had not been
        self.index.add(self.number)
        self.claimed -= {(row.sha256, row.plan) for row in shard.rows}
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

    def _known(self, sha256: str, plan: str) -> bool:
        return (sha256, plan) in self.claimed or self.index.has(sha256, plan)

    def _stored(self, sha256: str, plan: str) -> bool:
        return self.index.has(sha256, plan) or (sha256, plan) in self.elsewhere

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
    """Pictures, each under its plan, whose features are being computed. ends: stretches to finish
    after it."""

    stretch: _Stretch
    pictures: list[Picture]
    plans: list[str]
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


def _codec_of(folder: Path, about: dict[str, Any], whitening: Whitening | None) -> Codec:
    """The cache's codec, calibrated as in its first shard that is, else as given, else not yet."""
    codec = codec_named(about["codec"])
    if codec.whitened:
        for name in list_shards(folder).values():
            found = read_header(folder / SHARDS / name).codec
            if found.whitening:
                return found
    return settled(codec, whitening) if whitening else codec
