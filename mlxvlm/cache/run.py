"""One run of a writer: pictures in, shards out.

The names that no shard accounts for yet are cut, in their order, into stretches of
`shard_pictures`; each stretch becomes one shard, and within it each `batch_size` new pictures one
batch. Both depend on the input list alone, never on time or threads, so that a resumed cache is
byte-identical to an uninterrupted one:

    finished shards | stretch | stretch | ... | names that failed in an earlier run
                      ^ an interrupted one is done again whole

A picture whose content is in an earlier shard is only named. One that cannot be read, or whose
features cannot be stored, costs itself: its shard names it with the reason.

This thread owns MLX. Others read, hash and tile ahead of it with NumPy; while a batch is computed,
the one before is encoded, written and synced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheError
from ..images.picture import Features, Picture
from .codecs import Unfit, codec_named
from .format import Source, list_shards
from .index import Index, IndexDamaged
from .loader import Loaded, Loader
from .shard import ShardWriter

Reporter = Callable[["Summary"], None]


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
    """Carries a list of (name, path) into the shards of a folder. Needs the writer's lock."""

    def __init__(
        self,
        encoder: Any,
        folder: Path,
        about: dict[str, Any],
        summary: Summary,
        workers: int,
        progress: Reporter | None,
    ):
        self.encoder = encoder
        self.folder = folder
        self.about = about
        self.codec = codec_named(about["codec"])
        self.batch_size: int = about["batch_size"]
        self.shard_pictures: int = about["shard_pictures"]
        self.progress = progress
        self.summary = summary
        self.index = _open_index(folder, about)
        self.loader = Loader(encoder, self._known, workers, depth=2 * self.batch_size + workers)
        self.claimed: set[str] = set()  # contents on their way into a shard that is not finished
        self.failed: dict[str, str] = {}  # contents that could not be stored, and why
        self.shard: ShardWriter | None = None  # the one being written
        self.waiting: list[Callable[[], None]] = []  # what is to be done while MLX computes
        self.number = max(list_shards(folder), default=-1) + 1
        self.started = time.monotonic()

    def run(self, jobs: list[tuple[str, Path]]) -> None:
        new, failed = self._split(jobs)
        self.summary.known = len(jobs) - len(new) - len(failed)
        stretches = [(part, False) for part in _cut(new, self.shard_pictures)]
        stretches += [(part, True) for part in _cut(failed, self.shard_pictures)]
        loaded = self.loader.load(job for part, _ in stretches for job in part)
        for part, retry in stretches:
            self._stretch(part, retry, loaded)
        self._settle()
        self._report()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.close()
        if self.shard:
            self.shard.abandon()
        self.index.close()

    def _split(self, jobs: list[tuple[str, Path]]) -> tuple[list, list]:
        """Jobs that no shard accounts for, and those that failed before and may do better."""
        new, failed = [], []
        for name, path in jobs:
            known = self.index.name(name)
            if known is None:
                new.append((name, path))
            elif known.sha256 is None:
                failed.append((name, path))
            elif not self.index.has(known.sha256) or _changed(known, path):
                new.append((name, path))
        return new, failed

    def _stretch(self, part: list[tuple[str, Path]], retry: bool, loaded: Iterator[Loaded]) -> None:
        stretch = _Stretch([name for name, _ in part], retry)
        batch: list[Picture] = []
        idle = True
        for one in islice(loaded, len(part)):
            source = one.source
            stretch.sources.append(source)
            if source.sha256 is None or source.sha256 in self.failed or self._known(source.sha256):
                continue  # `_finish` sees what became of it
            assert one.picture is not None
            self.claimed.add(source.sha256)
            batch.append(one.picture)
            if len(batch) == self.batch_size:
                self._launch(stretch, batch)
                batch, idle = [], False
        if batch:
            self._launch(stretch, batch)
            idle = False
        self.waiting.append(lambda: self._finish(stretch))
        if idle:
            self._settle()  # nothing is being computed that it could wait for

    def _launch(self, stretch: _Stretch, batch: list[Picture]) -> None:
        import mlx.core as mx

        features = self.encoder.encode(batch)
        mx.async_eval([view for one in features for view in one.views])
        self._settle()
        self.waiting.append(lambda: self._write(stretch, batch, features))

    def _settle(self) -> None:
        """Does what waits, while the batch launched last is being computed."""
        waiting, self.waiting = self.waiting, []
        for act in waiting:
            act()

    def _write(self, stretch: _Stretch, batch: list[Picture], features: list[Features]) -> None:
        shard = self._shard_of(stretch)
        for picture, found in zip(batch, features, strict=True):
            assert picture.sha256 is not None
            try:
                size = shard.add(picture, [_host(view) for view in found.views])
            except Unfit as error:
                self.failed[picture.sha256] = str(error)
                continue
            self.summary.encoded += 1
            self.summary.views += len(found.views)
            self.summary.bytes += size
        self._report()

    def _finish(self, stretch: _Stretch) -> None:
        for source in stretch.sources:
            if source.sha256 in self.failed:
                source.reason, source.sha256 = self.failed[source.sha256], None
            if source.sha256 is None:
                self.summary.failures.append((source.name, source.reason))
        named = [source for source in stretch.sources if source.sha256]
        if stretch.retry:
            if not named:
                self.shard = None  # they fail as an earlier shard says: nothing new to keep
                return
            stretch.sources = named
        shard = self._shard_of(stretch)
        shard.finish(stretch.sources)
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
        return sha256 in self.claimed or self.index.has(sha256)

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


def _host(view: Any) -> np.ndarray:
    """Features as float32 on the host; Unfit where they are not finite."""
    if not isinstance(view, np.ndarray):
        import mlx.core as mx

        view = np.array(view.astype(mx.float32))
    if not np.isfinite(view).all():
        raise Unfit("the encoder's features of it are not finite")
    return view


def _cut(jobs: list[tuple[str, Path]], size: int) -> list[list[tuple[str, Path]]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def _changed(known: Source, path: Path) -> bool:
    """Whether the file is another one now; names outlive the files they came from."""
    try:
        state = path.stat()
    except OSError:
        return False
    return (state.st_size, state.st_mtime_ns) != (known.size, known.mtime_ns)


def _open_index(folder: Path, about: dict[str, Any]) -> Index:
    """An index to rely on: read whole, and without damaged shards."""
    index = Index.open_for_writing(folder, about)
    try:
        try:
            index.check()
        except IndexDamaged:
            index.close()
            index = Index.open_for_writing(folder, about, distrust=True)
        problems = index.problems()
    except BaseException:
        index.close()
        raise
    if problems:
        index.close()
        raise CacheError("\n".join(problems.values()))
    return index
