"""What a run has to do: each picture of the input, under each tiling plan that its rows ask for.

A picture alone in its row may have all the tiles that the tiling makes, one among several only its
share. A picture in a row of one and in a row of three is two jobs, and is stored twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..config import TilingConfig
from ..data.origins import Cell, Member, Origin, state_of
from ..errors import CacheError
from .format import Source, plan_of, source_name

if TYPE_CHECKING:
    from .index import Index

# Views that a batch may begin its last picture with: those of tiled pictures are many.
BATCH_VIEWS = 32


class Named(NamedTuple):
    """A picture as rows name it, one `among` so many of its row."""

    name: str
    origin: Origin
    among: int = 1


class Job(NamedTuple):
    """A picture to be cached, in at most `limit` tiles; None is the tiling's own limit."""

    name: str
    origin: Origin
    limit: int | None = None

    @property
    def plan(self) -> str:
        return plan_of(self.limit)


def distinct(
    sources: Iterable[Job | Named | tuple[str, Origin]],
    tiling: TilingConfig | None = None,
    max_tiles: int = 0,
) -> list[Job]:
    """One job a name and tiling plan, in order of first appearance; max_tiles: of a row, where it
    is to have fewer than the tiling allows."""
    from ..images.tiling import tiles_each

    jobs: dict[tuple[str, int | None], Job] = {}
    origins: dict[str, Origin] = {}
    for given in sources:
        if isinstance(given, Job):
            limit = given.limit
        else:
            limit = None
            if tiling and len(given) > 2:
                limit = tiles_each(tiling, given[2], max_tiles)
        name = source_name(given[0])
        origin = given[1]
        # Text, since a Path takes several times its room, and more once it has been used.
        origin = origin if isinstance(origin, Member | Cell) else os.fspath(origin)
        known = origins.setdefault(name, origin)
        if known != origin:
            raise CacheError(f"the name {name!r} stands for both {known} and {origin}.")
        jobs.setdefault((name, limit), Job(name, known, limit))
    return list(jobs.values())


@dataclass
class Remaining:
    """new: jobs that no shard accounts for; changed: whose picture is another one now; failed:
    that failed before, and may do better."""

    new: list[Job] = field(default_factory=list)
    changed: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.new) + len(self.changed) + len(self.failed)


def remaining(
    jobs: list[Job],
    index: Index,
    trust_names: bool,
    stored: Callable[[str, str], bool] | None = None,
) -> Remaining:
    """What of `jobs` is to be done.

    stored: whether a content needs no encoding under a plan; by default, whether the index has it.
    """
    stored = stored or index.has
    left = Remaining()
    for job in jobs:
        known = index.name(job.name, job.plan)
        if known is None:
            left.new.append(job)
        elif known.sha256 is None:
            left.failed.append(job)
        elif not stored(known.sha256, job.plan):
            left.new.append(job)
        elif not trust_names and _changed(known, job.origin):
            left.changed.append(job)
    return left


def is_full(pictures: int, views: int, batch_size: int) -> bool:
    """Whether a batch of so many pictures and views takes no more."""
    return pictures >= batch_size or views >= BATCH_VIEWS


def _changed(known: Source, origin: Origin) -> bool:
    """Whether the file is another one now; names outlive the files they came from."""
    try:
        return state_of(origin) != (known.size, known.mtime_ns)
    except OSError:
        return False
