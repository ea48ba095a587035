"""Damaged shards made whole again, from the pictures that they were made of.

Where a shard's header is sound, the batches that damaged records were in are encoded again, and the
records put in their places: with the encoder and the machine of before, the file is what it was,
bit for bit. Where the header is lost, the names in the index say which pictures were in there; they
go into new shards, and the damaged one is removed when all of them are back.

A picture counts as a source only while it is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.origins import Origin, locate, read_bytes
from ..errors import CacheError, PictureError
from ..images.picture import Picture
from .about import CACHE_JSON, differences, plain, read_about
from .format import SHARDS, Header, Row, limit_of, list_shards, read_header, shard_name, told
from .index import KNOWN, Index
from .jobs import Job, is_full
from .loader import look
from .lock import WriterLock
from .rewrite import rewrite
from .run import Run, Summary, host
from .verify import damaged_rows, names_of
from .writer import sweep


@dataclass
class Repaired:
    """What a repair did. pictures: encoded again; shards: that were damaged; left: (what, why) of
    what is still damaged."""

    pictures: int = 0
    shards: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)


def repair_cache(
    encoder: Any,
    folder: str | Path,
    images: str | Path = ".",
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Reads all of a cache and encodes again what is damaged. images: what names are relative to.

    progress: called with the shards read and their number.
    """
    folder, root = Path(folder), Path(images)
    about = read_about(folder)
    different = differences(about["encoder"], plain(encoder.identity()))
    if different:
        raise CacheError(
            f"{folder} was made by another encoder; they differ in {'; '.join(different)}. Repair "
            "it with the one that made it."
        )
    done = Repaired()
    with WriterLock(folder):
        sweep(folder)
        unreadable: list[int] = []
        shards = list_shards(folder)
        for count, (number, name) in enumerate(shards.items(), 1):
            path = folder / SHARDS / name
            try:
                header = read_header(path)
            except CacheError:
                unreadable.append(number)
            else:
                if differences(header.about, about):
                    done.left.append((str(path), f"it does not agree with {CACHE_JSON}"))
                    continue
                bad = [row for row, _ in damaged_rows(path, header)]
                if bad:
                    done.shards += 1
                    _mend(encoder, path, header, bad, root, done)
            if progress:
                progress(count, len(shards))
        _replace(encoder, folder, about, unreadable, root, done)
        Index.open_for_writing(folder, about).close()
    return done


def _mend(
    encoder: Any, path: Path, header: Header, bad: list[Row], root: Path, done: Repaired
) -> None:
    """Puts new records in the places of those of `bad`."""
    names = names_of(header)
    wanted = {(row.sha256, row.plan) for row in bad}
    replaced: dict[int, bytes] = {}
    for batch in _batches(header):
        if not any((row.sha256, row.plan) in wanted for row in batch):
            continue
        # With those beside it, because the last bits depend on the batch.
        rows, pictures = [], []
        for row in batch:
            try:
                pictures.append(_look(encoder, names.get(row.sha256, []), row, root))
                rows.append(row)
            except (CacheError, OSError, PictureError) as error:
                if (row.sha256, row.plan) in wanted:
                    done.left.append((_label(row, names), _reason(error)))
        for row, features in zip(rows, encoder.encode(pictures) if rows else [], strict=True):
            if (row.sha256, row.plan) not in wanted:
                continue
            records = [header.codec.encode(host(view)) for view in features.views]
            data = [record.reshape(-1).view(np.uint8).tobytes() for record in records]
            if [len(one) for one in data] != [view.size for view in row.views]:
                done.left.append((_label(row, names), "it gives views of other sizes now"))
                continue
            done.pictures += 1
            replaced.update(zip((view.offset for view in row.views), data, strict=True))
    if replaced:
        rewrite(path, header, header.rows, header.sources, replaced, room=header.start)


def _batches(header: Header) -> list[list[Row]]:
    """The rows of a shard as they were encoded together."""
    batches: list[list[Row]] = []
    views = 0
    for row in header.rows:
        if not batches or is_full(len(batches[-1]), views, header.about["batch_size"]):
            batches.append([])
            views = 0
        batches[-1].append(row)
        views += len(row.views)
    return batches


def _replace(
    encoder: Any,
    folder: Path,
    about: dict[str, Any],
    unreadable: list[int],
    root: Path,
    done: Repaired,
) -> None:
    """Encodes what was in shards without a header into new ones, and removes those."""
    if not unreadable:
        return
    done.shards += len(unreadable)
    index = Index.open_for_writing(folder, about)
    try:
        lost = index.without(unreadable)
    finally:
        index.close()
    # The index may not have noticed: a disk that flips bits leaves sizes and times as they were.
    index = Index.open_for_writing(folder, about, renew=True)
    problems = index.problems()
    index.close()
    jobs: list[Job] = []
    left: list[tuple[str, str]] = []
    for source in lost:
        origin = locate(root, source.name)
        try:
            _read(origin, source.sha256)
            jobs.append(Job(source.name, origin, limit_of(source.plan)))
        except (CacheError, OSError, PictureError) as error:
            left.append((told(source), _reason(error)))
    if jobs:
        summary = Summary(len(jobs))
        with Run(encoder, folder, about, summary, workers=2, progress=None, mending=True) as run:
            run.run(jobs)
        done.pictures += summary.encoded
        left += summary.failures
    left += [
        (shard_name(number), f"{problem} No index has the names of its pictures")
        for number, problem in problems.items()
        if not problem.endswith(KNOWN)
    ]
    done.left += left
    if not left:
        for number, name in list_shards(folder).items():
            if number in unreadable:
                (folder / SHARDS / name).unlink()


def _look(encoder: Any, names: list[str], row: Row, root: Path) -> Picture:
    error: Exception = CacheError("no name of it is known")
    for name in names:
        try:
            data = _read(locate(root, name), row.sha256)
            picture = look(encoder, data, limit_of(row.plan))
            picture.sha256 = row.sha256
            return picture
        except (CacheError, OSError, PictureError) as found:
            error = found
    raise error


def _read(origin: Origin, sha256: str | None) -> bytes:
    data, _ = read_bytes(origin)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CacheError("it is another picture now")
    return data


def _label(row: Row, names: dict[str, list[str]]) -> str:
    return ", ".join(names.get(row.sha256, [row.sha256]))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
