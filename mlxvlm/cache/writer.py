"""Making a cache in a folder, or going on with it.

A folder has one writer at a time, and takes only what agrees with its cache.json. A run may be
stopped anywhere, by kill -9 too: finished shards stay, the unfinished one is done again.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from .durable import PARTIAL, is_full
from .format import SHARDS, list_shards, source_name
from .index import INDEX
from .lock import LOCK, WriterLock
from .run import Reporter, Run, Summary

BATCH_SIZE = 8
SHARD_PICTURES = 256  # 430 MB of SigLIP-So400m in bf16: under a minute of a laptop's work


def write_cache(
    encoder: Any,
    sources: Iterable[tuple[str, str | Path]],
    out: str | Path,
    codec: str = "float32",
    *,
    batch_size: int | None = None,
    shard_pictures: int | None = None,
    workers: int = 2,
    strict: bool = False,
    progress: Reporter | None = None,
) -> Summary:
    """Caches the features of `sources`, (name, path) in order, in the folder `out`; resumes.

    encoder: has look, encode and identity, as `vision.Encoder`.
    codec: "float32", "bf16" or "fp16".
    batch_size, shard_pictures: kept in the cache; a later run may only repeat them.
    strict: CacheError at the end if any picture failed; the others are cached all the same.
    progress: called after each batch with the summary so far.
    """
    folder = Path(out)
    jobs = _distinct(sources)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary(len(jobs))
    with WriterLock(folder):
        try:
            about = _settle_about(folder, encoder, codec, batch_size, shard_pictures)
            (folder / SHARDS).mkdir(exist_ok=True)
            for left in [*folder.glob(f"*{PARTIAL}"), *(folder / SHARDS).glob(f"*{PARTIAL}")]:
                left.unlink()
            with Run(encoder, folder, about, summary, workers, progress) as run:
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


def _distinct(sources: Iterable[tuple[str, str | Path]]) -> list[tuple[str, Path]]:
    jobs: dict[str, Path] = {}
    for given, path in sources:
        name = source_name(given)
        if jobs.setdefault(name, Path(path)) != Path(path):
            raise CacheError(f"the name {name!r} stands for both {jobs[name]} and {path}.")
    return list(jobs.items())


def _check_folder(folder: Path) -> None:
    ours = {CACHE_JSON, SHARDS, LOCK}
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


def _settle_about(
    folder: Path,
    encoder: Any,
    codec: str,
    batch_size: int | None,
    shard_pictures: int | None,
) -> dict[str, Any]:
    """What the cache is: as its folder says, if that is what is asked for; new otherwise."""
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
    if not is_cache_json(folder):
        write_about(folder, about)
    return about


def _disk_full(folder: Path, s: Summary) -> CacheError:
    left = s.total - s.done
    need = f"about {left * s.bytes // s.encoded:,} bytes" if s.encoded else "more bytes"
    free = shutil.disk_usage(folder).free
    return CacheError(
        f"the disk of {folder} is full: {need} are needed for the {left:,} pictures left, and "
        f"{free:,} are free. What is finished is safe: make room and run the same command again."
    )
