"""Reading a whole cache to see what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .about import CACHE_JSON, differences
from .format import SHARDS, Header, list_shards, read_header
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
            problems += _damaged_records(path, header)
        except CacheError as error:
            problems.append(str(error))
        if progress:
            progress(done, len(shards))
    return problems


def _damaged_records(path: Path, header: Header) -> list[str]:
    names: dict[str, list[str]] = {}
    for source in header.sources:
        if source.sha256:
            names.setdefault(source.sha256, []).append(source.name)
    problems = []
    shard = OpenShard(path)
    for row in header.rows:
        label = ", ".join(names.get(row.sha256, [row.sha256]))
        for view in row.views:
            try:
                shard.read(view, label)
            except CacheError as error:
                problems.append(str(error))
                break  # one line a picture
    return problems
