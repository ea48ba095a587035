"""Reading a whole cache to see what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .about import CACHE_JSON, differences
from .format import SHARDS, Header, Row, list_shards, read_header
from .records import OpenShard


def verify_shards(
    folder: Path, about: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """What is wrong with the shards: every header against its digest, every record's checksum.

    progress: called with the shards done and their number.
    """
    problems = []
    shards = list_shards(folder)
    for done, name in enumerate(shards.values(), 1):
        path = folder / SHARDS / name
        try:
            header = read_header(path)
            different = differences(header.about, about, "in the shard", f"in {CACHE_JSON}")
            if different:
                problems.append(
                    f"shard {path} differs from {CACHE_JSON} in {'; '.join(different)}."
                )
            problems += [problem for _, problem in damaged_rows(path, header)]
        except CacheError as error:
            problems.append(str(error))
        if progress:
            progress(done, len(shards))
    return problems


def damaged_rows(path: Path, header: Header) -> Iterator[tuple[Row, str]]:
    """(row, what is wrong with it) of each picture whose records do not match their checksums."""
    names = names_of(header)
    shard = OpenShard(path)
    for row in header.rows:
        label = ", ".join(names.get(row.sha256, [row.sha256]))
        for view in row.views:
            try:
                shard.read(view, label)
            except CacheError as error:
                yield row, str(error)
                break  # one line a picture


def names_of(header: Header) -> dict[str, list[str]]:
    """sha256 -> the names that a shard has for it."""
    names: dict[str, list[str]] = {}
    for source in header.sources:
        if source.sha256:
            names.setdefault(source.sha256, []).append(source.name)
    return names
