"""Making a cache in a folder, or going on with it.

A folder has one writer at a time, and takes only what agrees with its cache.json. A run may be
stopped anywhere, by kill -9 too: finished shards stay, the unfinished one is done again.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..amount import amount
from ..data.origins import Origin
from ..durable import PARTIAL, is_full
from ..errors import CacheError
from .about import (
    CACHE_JSON,
    FORMAT_VERSION,
    differences,
    is_cache_json,
    plain,
    read_about,
    write_about,
)
from .codecs import codec_named
from .format import SHARDS, list_shards
from .index import INDEX
from .jobs import Job, Named, distinct
from .lock import LOCK, WriterLock
from .parts import PART_JSON, contents, mark_part
from .run import Reporter, Run, Summary
from .whitening import Whitening

BATCH_SIZE = 8
SHARD_PICTURES = 256  # 430 MB of SigLIP-So400m in bf16: under a minute of a laptop's work


def write_cache(
    encoder: Any,
    sources: Iterable[Job | Named | tuple[str, Origin]],
    out: str | Path,
    codec: str = "float32",
    *,
    batch_size: int | None = None,
    shard_pictures: int | None = None,
    workers: int = 2,
    strict: bool = False,
    trust_names: bool = False,
    progress: Reporter | None = None,
    earlier: Iterable[Job | Named | tuple[str, Origin]] = (),
    whitening: Whitening | None = None,
) -> Summary:
    """Caches the features of `sources`, in order, in the folder `out`; resumes.

    encoder: has look, encode, identity and maybe a tiling, as `vision.Encoder`.
    sources: (name, origin), or as `picture_sources` or `jobs.distinct` give them.
    codec: "float32", "bf16", "fp16", "int8" or "int4".
    batch_size, shard_pictures: kept in the cache; a later run may only repeat them.
    strict: CacheError at the end if any picture failed; the others are cached all the same.
    trust_names: what the cache knows by its name is taken as it is, even if the picture changed.
    progress: called after each batch with the summary so far.
    earlier: what comes before `sources` in an input of several parts; see `parts`.
    whitening: for int8 and int4 in a new cache, instead of calibrating on its first shard, or on
        the first of `earlier`.
    """
    folder = Path(out)
    tiling = getattr(encoder, "tiling", None)
    jobs, before = distinct(sources, tiling), distinct(earlier, tiling)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary(len(jobs), sum(job.limit is not None for job in jobs))
    with WriterLock(folder):
        try:
            about = settle_about(folder, encoder, codec, batch_size, shard_pictures)
            (folder / SHARDS).mkdir(exist_ok=True)
            sweep(folder)
            elsewhere = contents(before, workers)
            if before:
                mark_part(folder, len(before))
            if before and not whitening and codec_named(codec).whitened:
                whitening = _calibration(encoder, folder, about, before, workers)
            with Run(
                encoder,
                folder,
                about,
                summary,
                workers,
                progress,
                trust_names,
                elsewhere,
                whitening=whitening,
            ) as run:
                run.run(jobs)
        except (OSError, sqlite3.OperationalError) as error:
            if not is_full(error):
                raise
            raise _disk_full(folder, summary) from None
    if summary.total and len(summary.failures) == summary.total:
        name, reason = summary.failures[0]
        raise CacheError(
            f"none of the {summary.total} pictures could be cached; the first, {name}: {reason}."
        )
    if strict and summary.failures:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in summary.failures)
        raise CacheError(
            f"{len(summary.failures)} of {summary.total} pictures could not be cached; the others "
            f"are. Mend or remove them, and run this again:\n{listed}"
        )
    return summary


def _calibration(
    encoder: Any, folder: Path, about: dict[str, Any], earlier: Sequence[Job], workers: int
) -> Whitening | None:
    """What the first part calibrates itself on, so that all parts decode alike."""
    from .calibrate import calibrate

    if list_shards(folder):
        return None  # they have it
    return calibrate(encoder, earlier, about["batch_size"], about["shard_pictures"], workers)


def sweep(folder: Path) -> None:
    """Removes what a killed writer left. Needs the writer's lock."""
    for left in [*folder.glob(f"*{PARTIAL}"), *(folder / SHARDS).glob(f"*{PARTIAL}")]:
        left.unlink()
    journal = folder / f"{INDEX}-journal"
    # SQLite rolls back what is in a journal, but lets an empty one lie.
    if journal.exists() and not journal.stat().st_size:
        journal.unlink()


def check_folder(folder: Path) -> None:
    """CacheError where there is something else than a cache."""
    ours = {CACHE_JSON, SHARDS, LOCK, PART_JSON}
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file: --out must name a folder.")
    if not folder.exists() or (folder / CACHE_JSON).exists() or (folder / SHARDS).exists():
        return
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not path.name.startswith((".", INDEX, CACHE_JSON))
    )
    if foreign:
        raise CacheError(
            f"{folder} holds other files ({', '.join(foreign[:3])}): name an empty or new folder, "
            "or one with a cache in it."
        )


def settle_about(
    folder: Path,
    encoder: Any,
    codec: str,
    batch_size: int | None,
    shard_pictures: int | None,
    write: bool = True,
) -> dict[str, Any]:
    """What the cache is: as its folder says, if that is what is asked for; new otherwise.

    write: puts down what its folder lacks of it.
    """
    for name, value in (("batch_size", batch_size), ("shard_pictures", shard_pictures)):
        if value is not None and value < 1:
            raise CacheError(f"{name} (={value}) must be at least 1.")
    asked: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "codec": codec_named(codec).name,
        "encoder": plain(encoder.identity()),
    }
    if not (folder / CACHE_JSON).exists() and not list_shards(folder):
        about = {
            **asked,
            "batch_size": batch_size or BATCH_SIZE,
            "shard_pictures": shard_pictures or SHARD_PICTURES,
        }
        if write:
            write_about(folder, about)
        return about
    about = read_about(folder)
    asked["batch_size"] = batch_size or about.get("batch_size")
    asked["shard_pictures"] = shard_pictures or about.get("shard_pictures")
    different = differences(about, asked)
    if different:
        raise CacheError(
            f"{folder} holds a cache made in another way; they differ in {'; '.join(different)}. "
            "Repeat what made it, or name another folder."
        )
    if write and not is_cache_json(folder):
        write_about(folder, about)
    return about


def _disk_full(folder: Path, s: Summary) -> CacheError:
    left = s.total - s.done
    need = f"about {amount(left * s.bytes / s.encoded)}" if s.encoded else "more bytes"
    free = shutil.disk_usage(folder).free
    return CacheError(
        f"the disk of {folder} is full: {need} are needed for the {left:,} pictures left, and "
        f"{amount(free)} are free. What is finished is safe: make room and run the same command "
        "again."
    )
