"""A cache without the pictures that no data need any more.

What stays is decided before anything is written, by content. Then one shard after the other that
holds something else is written anew beside, and renamed: a run that was killed leaves a cache, and
the same command goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..durable import is_full
from ..errors import CacheError
from .about import read_about
from .format import SHARDS, list_shards, read_header, source_name
from .index import Index
from .lock import WriterLock
from .rewrite import rewrite
from .run import open_sound
from .writer import sweep


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
    names: Iterable[str],
    images: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Drops the pictures that have none of these names, and those stored a second time.

    A picture that stays keeps all its names. `images`: what absolute names are relative to.
    progress: called with the shards done and their number.
    """
    folder = Path(folder)
    about = read_about(folder)
    with WriterLock(folder):
        sweep(folder)
        index = open_sound(folder, about)
        try:
            keep, failed = _wanted(index, names, Path(images) if images else None)
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


def _wanted(index: Index, names: Iterable[str], images: Path | None) -> tuple[set[str], set[str]]:
    """Contents to keep, and names of failures to keep."""
    keep: set[str] = set()
    failed: set[str] = set()
    for given in names:
        source = index.name(source_name(given))
        if source is None and images is not None:
            source = index.name(source_name(given, images))
        if source is None:
            continue
        if source.sha256:
            keep.add(source.sha256)
        else:
            failed.add(source.name)
    return keep, failed


def _prune(
    path: Path, number: int, index: Index, keep: set[str], failed: set[str], pruned: Pruned
) -> None:
    header = read_header(path)
    rows = []
    for row in header.rows:
        found = index.picture(row.sha256, row.plan) if row.sha256 in keep else None
        if found and found[0] == number:
            rows.append(row)
    good = [s for s in header.sources if s.sha256]
    bad = [s for s in header.sources if not s.sha256]
    sources = [s for s in good if s.sha256 in keep]
    pruned.kept += len(rows)
    if len(rows) == len(header.rows) and len(sources) == len(good):
        return
    sources += [s for s in bad if s.name in failed]
    pruned.dropped += len(header.rows) - len(rows)
    if rows or sources:
        pruned.bytes += header.length - rewrite(path, header, rows, sources)
        pruned.rewritten += 1
    else:
        path.unlink()
        pruned.bytes += header.length
        pruned.removed += 1
