"""Reading a whole cache to see what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .about import CACHE_JSON, differences
from .format import SHARDS, Header, Row, Source, list_shards, read_header, shard_name, told
from .records import OpenShard


@dataclass
class Problem:
    """What is damaged, in words; in which shard, and the names of which pictures, if known."""

    text: str
    shard: str
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text


def verify_shards(
    folder: Path, about: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """What is wrong with the shards: every header against its digest, every record's checksum.

    progress: called with the shards done and their number.
    """
    problems: list[Problem] = []
    shards = list_shards(folder)
    for done, name in enumerate(shards.values(), 1):
        path = folder / SHARDS / name
        try:
            header = read_header(path)
            different = differences(header.about, about, "in the shard", f"in {CACHE_JSON}")
            if different:
                text = f"shard {path} differs from {CACHE_JSON} in {'; '.join(different)}."
                problems.append(Problem(text, name))
            names = names_of(header)
            for row, text in damaged_rows(path, header):
                problems.append(Problem(text, name, names.get(row.sha256, [])))
        except CacheError as error:
            problems.append(Problem(str(error), name))
        if progress:
            progress(done, len(shards))
    return problems


def lost_names(lost: list[tuple[int, Source]]) -> list[Problem]:
    """The names without features, of `Index.lost`, as problems."""
    return [
        Problem(
            f"{told(source)} has lost its features, which a shard held that is gone or damaged: "
            "run the same `mlxvlm cache-embeddings` again",
            shard_name(number),
            [source.name],
        )
        for number, source in lost
    ]


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
            known = names.setdefault(source.sha256, [])
            if source.name not in known:
                known.append(source.name)
    return names
