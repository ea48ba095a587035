"""A finished shard, written anew: beside, and renamed over the old one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..durable import PARTIAL, publish, sync, write_all
from ..errors import CacheError
from .format import Header, Row, Source, View, build_header


def rewrite(
    path: Path,
    header: Header,
    rows: Sequence[Row],
    sources: list[Source],
    replaced: Mapping[int, bytes] | None = None,
    room: int = 0,
) -> int:
    """Leaves `rows` and `sources` of a shard with this header in it; returns its new size.

    replaced: records by the offset of those whose place they take. The others are moved as they
        are, with their checksums: what was damaged is still known to be.
    room: bytes for the header, at least.
    """
    replaced = replaced or {}
    moved: list[tuple[View, View]] = []
    kept: list[Row] = []
    at = 0
    for row in rows:
        views = []
        for old in row.views:
            data = replaced.get(old.offset)
            crc32 = old.crc32 if data is None else zlib.crc32(data)
            views.append(View(at, old.size, crc32, old.shape))
            moved.append((old, views[-1]))
            at += old.size
        kept.append(Row(row.sha256, row.plan, row.grid, row.size, views))
    new = build_header(Header(header.about, kept, sources), header.codec, reserved=room)
    partial = path.with_name(path.name + PARTIAL)
    source = os.open(path, os.O_RDONLY)
    try:
        target = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(target, new)
            for old, _ in moved:
                data = replaced.get(old.offset) or os.pread(source, old.size, old.offset)
                if len(data) != old.size:
                    raise CacheError(f"shard {path} changed while it was read: try again.")
                write_all(target, data)
            sync(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)
    publish(partial, path)
    return len(new) + at
