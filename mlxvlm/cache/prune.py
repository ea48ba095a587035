"""A cache without the pictures that no data need any more.

What stays is decided before anything is written, by content and tiling plan. Then one shard after
the other that holds something else is written anew beside, and renamed: a run that was killed
leaves a cache, and the same command goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..durable import is_full
from ..errors import CacheError
from ..images.tiling import tiles_each
from .about import read_about, tiling_of
from .format import SHARDS, Source, list_shards, plan_of, read_header, source_name
from .index import Index
from .lock import WriterLock
from .rewrite import rewrite
from .writer import sweep

Keep = dict[str, list[str]]  # sha256 -> tiling plans


@dataclass
class Pruned:
    """What a pruning did. kept, dropped: records of pictures; bytes: freed."""

    kept: int = 0
    dropped: int = 0
    bytes: int = 0
    rewritten: int = 0
    removed: int = 0


def prune_cache(
    folder: str | Path,
    names: Iterable[tuple[str, int]],
    images: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_tiles: int = 0,
) -> Pruned:
    """Drops the pictures that have none of these names, and those stored a second time.

    names: each with how many pictures its row has; a picture stays under the tiling plans of such
    rows, with all its names. `images`: what absolute names are relative to.
    progress: called with the shards done and their number. max_tiles: as in `distinct`.
    """
    folder = Path(folder)
    about = read_about(folder)
    tiling = tiling_of(about)
    limits = ((name, tiles_each(tiling, n, max_tiles) if tiling else None) for name, n in names)
    wanted = ((name, plan_of(limit)) for name, limit in limits)
    with WriterLock(folder):
        sweep(folder)
        index = Index.open_sound(folder, about)
        try:
            keep, failed = _wanted(index, wanted, Path(images) if images else None)
            if not keep:
                raise CacheError(
                    f"no picture of {folder} is named by the data to keep: nothing was dropped. "
                    "Delete the folder if that is meant; names are relative to --images."
                )
            pruned = Pruned()
            shards = list_shards(folder)
            for done, (number, name) in enumerate(shards.items(), 1):
                _prune(folder / SHARDS / name, number, index, keep, failed, pruned)
                if progress:
                    progress(done, len(shards))
        except OSError as error:
            if not is_full(error):
                raise
            raise CacheError(
                f"the disk of {folder} is full: a shard is written anew before the old one goes. "
                "What is finished is safe: make room for one shard and run this again."
            ) from None
        finally:
            index.close()
        Index.open_for_writing(folder, about, distrust=True).close()
    return pruned


def _wanted(
    index: Index, names: Iterable[tuple[str, str]], images: Path | None
) -> tuple[Keep, set[tuple[str, str]]]:
    """Contents to keep, and (names of failures, plan) to keep."""
    keep: Keep = {}
    failed: set[tuple[str, str]] = set()
    for given, plan in names:
        found = index.named(source_name(given))
        if not found and images is not None:
            found = index.named(source_name(given, images))
        for source in found:
            if source.sha256 and index.has(source.sha256, plan):
                plans = keep.setdefault(source.sha256, [])
                if plan not in plans:
                    plans.append(plan)
            elif source.sha256 is None and source.plan == plan:
                failed.add((source.name, plan))
    return keep, failed


def _prune(
    path: Path,
    number: int,
    index: Index,
    keep: Keep,
    failed: set[tuple[str, str]],
    pruned: Pruned,
) -> None:
    header = read_header(path)
    rows = []
    for row in header.rows:
        wanted = row.plan in keep.get(row.sha256, ())
        found = index.picture(row.sha256, row.plan) if wanted else None
        if found and found[0] == number:
            rows.append(row)
    good = [s for s in header.sources if s.sha256]
    bad = [s for s in header.sources if not s.sha256]
    sources = _names(good, keep)
    pruned.kept += len(rows)
    if len(rows) == len(header.rows) and sources == good:
        return
    sources += [s for s in bad if (s.name, s.plan) in failed]
    pruned.dropped += len(header.rows) - len(rows)
    if rows or sources:
        pruned.bytes += header.length - rewrite(path, header, rows, sources)
        pruned.rewritten += 1
    else:
        path.unlink()
        pruned.bytes += header.length
        pruned.removed += 1


def _names(sources: list[Source], keep: Keep) -> list[Source]:
    """The names of what is kept; one whose own plan goes stands for a plan that stays."""
    found: dict[tuple[str, str], Source] = {}
    for source in sources:
        kept = keep.get(source.sha256 or "")
        if kept:
            plan = source.plan if source.plan in kept else min(kept)
            found.setdefault((source.name, plan), replace(source, plan=plan))
    return list(found.values())
