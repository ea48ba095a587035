"""Caches of one encoder joined into one, by moving their shards. Nothing is encoded.

The shards come in the order of the folders, after those that are there: as ever, names in a later
one win, and of two records of one picture the earlier is used. A shard is moved in one step, or
copied whole to another file system before it is removed here: a merge that was killed is gone on
with by the same command, and until then every shard is in one of the caches.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..amount import amount
from ..durable import PARTIAL, is_full, publish, sync
from ..errors import CacheError
from .about import CACHE_JSON, differences, is_cache_json, read_about, write_about
from .format import SHARDS, digest_of, list_shards, read_header, shard_name
from .index import INDEX, Index
from .lock import WriterLock
from .parts import PART_JSON
from .verify import damaged_rows
from .writer import check_folder, sweep


@dataclass
class Merged:
    """What a merge did: shards and bytes moved, shards that were there already."""

    shards: int = 0
    bytes: int = 0
    already: int = 0


def merge_caches(
    out: str | Path,
    folders: Sequence[str | Path],
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Moves the shards of `folders`, in that order, into `out`; leaves the folders empty.

    CacheError, before anything is moved, if the caches differ, are damaged or are being written.
    progress: called with the shards done and their number.
    """
    out, parts = Path(out), [Path(folder) for folder in folders]
    _distinct([out, *parts])
    abouts = [read_about(part) for part in parts]
    check_folder(out)
    there = (out / CACHE_JSON).exists() or bool(list_shards(out))
    about = read_about(out) if there else abouts[0]
    _agree([out if there else parts[0], *parts], [about, *abouts])
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for folder in [out, *parts]:
            stack.enter_context(WriterLock(folder))
        todo = [path for part in parts for path in _shards(part, about)]
        (out / SHARDS).mkdir(exist_ok=True)
        sweep(out)
        if not is_cache_json(out):
            write_about(out, about)
        index = Index.open_sound(out, about)
        stack.callback(index.close)
        return _move(todo, out, index, progress)


def _move(
    todo: list[Path], out: Path, index: Index, progress: Callable[[int, int], None] | None
) -> Merged:
    merged = Merged()
    there = {digest_of(out / SHARDS / name): name for name in list_shards(out).values()}
    number = max(list_shards(out), default=-1) + 1
    for done, path in enumerate(todo, 1):
        twin = there.get(digest_of(path))
        if twin and not _is_damaged(out / SHARDS / twin):
            path.unlink()  # copied by a merge that was killed, or one of two copies of a cache
            merged.already += 1
        else:
            final = out / SHARDS / shard_name(number)
            merged.bytes += path.stat().st_size
            _take(path, final, sum(p.stat().st_size for p in todo[done - 1 :]))
            there[digest_of(final)] = final.name
            index.add(number)
            number += 1
            merged.shards += 1
        if progress:
            progress(done, len(todo))
    for folder in {path.parents[1] for path in todo}:
        for name in (INDEX, f"{INDEX}-journal"):
            (folder / name).unlink(missing_ok=True)
    index.seal()
    if not index.lost():
        (out / PART_JSON).unlink(missing_ok=True)  # with the parts before it, it is none any more
    return merged


def _take(path: Path, final: Path, needed: int) -> None:
    try:
        publish(path, final)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    partial = final.with_name(final.name + PARTIAL)
    try:
        shutil.copyfile(path, partial)
        fd = os.open(partial, os.O_RDONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if not is_full(error):
            raise
        raise CacheError(
            f"the disk of {final.parent.parent} is full: {amount(needed)} are still to come. "
            "Nothing is lost: make room and run the same command again."
        ) from None
    publish(partial, final)
    path.unlink()


def _shards(part: Path, about: dict[str, Any]) -> list[Path]:
    """A part's shards, each with a sound header that belongs here."""
    found = []
    for name in list_shards(part).values():
        path = part / SHARDS / name
        header = read_header(path)
        _agree([part, path], [about, header.about])
        found.append(path)
    return found


def _agree(where: list[Path], abouts: list[dict[str, Any]]) -> None:
    for path, about in zip(where[1:], abouts[1:], strict=True):
        different = differences(abouts[0], about, f"in {where[0]}", f"in {path}")
        if different:
            raise CacheError(
                f"{path} cannot be merged: the caches differ in {'; '.join(different)}."
            )


def _is_damaged(path: Path) -> bool:
    try:
        return any(True for _ in damaged_rows(path, read_header(path)))
    except CacheError:
        return True


def _distinct(folders: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for folder in folders:
        if seen.setdefault(folder.resolve(), folder) is not folder:
            raise CacheError(f"{folder} is named twice: a cache cannot be merged with itself.")
