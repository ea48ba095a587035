"""What a shard is, byte by byte.

It is a valid safetensors file whose header starts with its own digest:

    8 bytes    N, little-endian
    N bytes    {"__metadata__": {"digest": ..., "about", "codec", "rows", "sources", "failures"},
                "<sha256>/<plan>/<view>": {"dtype", "shape", "data_offsets"}, ...} and spaces
    the rest   the records, one a view, without gaps

`digest` is the sha256 of those N + 8 bytes with its own 64 letters as zeros, so that no bit of the
header can change unseen; each record has its crc32 in `rows`, so that no bit of the data can.
`codec` names the codec; for int8 and int4 it holds each channel's mean and scale, so that a shard
can be decoded alone; their records are several tensors, `<view>.scale` and such beside `<view>`.
`about` repeats cache.json: a shard knows what it is, and a lost cache.json can be rebuilt.
`sources` names every picture of the shard's stretch of the input, those stored in an earlier shard
under the same content too: with them names resolve without the pictures and without the index. A
name that rows give to a picture under two tiling plans is there for each.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import CacheError

if TYPE_CHECKING:
    from .codecs import Codec

SHARDS = "shards"
PLAN = "default"  # the tiling plan of a picture whose row does not limit its tiles
_LIMIT = "max-tiles-"
SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors")
_START = b'{"__metadata__":{"digest":"'
_MAX_HEADER = 1 << 30


@dataclass
class View:
    """Where a view's record is: offset from the start of the shard's file."""

    offset: int
    size: int
    crc32: int
    shape: tuple[int, int]


@dataclass
class Row:
    """A stored picture. grid: (rows, columns) of tiles; size: (width, height) in pixels."""

    sha256: str
    plan: str
    grid: tuple[int, int]
    size: tuple[int, int] | None
    views: list[View] = field(default_factory=list)


@dataclass
class Source:
    """A name in the input, and the tiling plan of the rows that it is in; `sha256` is None and
    `reason` says why where it could not be cached."""

    name: str
    size: int | None
    mtime_ns: int | None
    sha256: str | None = None
    reason: str = ""
    plan: str = PLAN


@dataclass
class Header:
    """What a shard says of itself. start: where the data begins; length: the file's; described: its
    codec, as text."""

    about: dict[str, Any]
    rows: list[Row]
    sources: list[Source]
    start: int = 0
    length: int = 0
    described: str = ""

    @cached_property
    def codec(self) -> Codec:
        """The codec that the shard describes; its code is loaded when a record is wanted."""
        from .codecs import described_codec

        return described_codec(self.described)


def build_header(header: Header, codec: Codec, reserved: int = 0) -> bytes:
    """The bytes before the data, padded to at least `reserved`. Views' offsets count from the data.

    The result depends on the arguments alone: no time, no machine, no dict order.
    """
    from .codecs import describe_codec

    rows, tensors = [], {}
    for row in header.rows:
        views = [[v.offset, v.size, v.crc32, list(v.shape)] for v in row.views]
        size = list(row.size) if row.size else None
        rows.append([row.sha256, row.plan, list(row.grid), size, views])
        for i, v in enumerate(row.views):
            at = v.offset
            for suffix, dtype, shape, length in codec.parts(v.shape):
                tensors[f"{row.sha256}/{row.plan}/{i}{suffix}"] = {
                    "dtype": dtype,
                    "shape": list(shape),
                    "data_offsets": [at, at + length],
                }
                at += length
    good = [_listed(s, s.sha256) for s in header.sources if s.sha256]
    bad = [_listed(s, s.reason) for s in header.sources if not s.sha256]
    metadata = {
        "digest": "0" * 64,
        "about": canonical(header.about),
        "codec": canonical(describe_codec(codec)),
        "rows": canonical(rows),
        "sources": canonical(good),
        "failures": canonical(bad),
    }
    text = canonical({"__metadata__": metadata, **tensors}, sort=False).encode()
    total = max(reserved, -(-(8 + len(text)) // 8) * 8)
    raw = (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
    return _with_digest(raw, hashlib.sha256(raw).hexdigest())


def read_header(path: Path) -> Header:
    """A shard's header, verified against its digest and the file's length; or CacheError."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            count = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or count > min(_MAX_HEADER, length - 8):
                raise _damaged(path, "its header has no end")
            raw = prefix + file.read(count)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    start = 8 + len(_START)
    digest = raw[start : start + 64].decode("ascii", "replace")
    if raw[8:start] != _START or hashlib.sha256(_with_digest(raw, "0" * 64)).hexdigest() != digest:
        raise _damaged(path, "its header does not match its digest")
    try:
        header = _parse(raw)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    end = max((v.offset + v.size for row in header.rows for v in row.views), default=header.start)
    if end != length:
        raise _damaged(path, f"it is {length} bytes long instead of {end}")
    header.length = length
    return header


def digest_of(path: Path) -> bytes:
    """The digest that a shard's header claims."""
    with open(path, "rb") as file:
        file.seek(8 + len(_START))
        return file.read(64)


def plan_of(max_tiles: int | None) -> str:
    """The tiling plan of a picture that its row of data limits to `max_tiles` tiles."""
    return PLAN if max_tiles is None else f"{_LIMIT}{max_tiles}"


def limit_of(plan: str) -> int | None:
    """`plan_of`, the other way."""
    return None if plan == PLAN else int(plan.removeprefix(_LIMIT))


def told(source: Source) -> str:
    """A source as people read it: its name, and its tiling plan if that is not the usual one."""
    limit = limit_of(source.plan)
    return source.name if limit is None else f"{source.name} (in at most {limit} tiles)"


def list_shards(folder: Path) -> dict[int, str]:
    """Number -> file name of the finished shards, in order."""
    try:
        names = os.listdir(folder / SHARDS)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = [(int(m[1]), name) for name in names if (m := SHARD_NAME.fullmatch(name))]
    return dict(sorted(found))


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def source_name(given: str, root: Path | None = None) -> str:
    """The one name of a picture: posix, relative to `root` where it lies under it, NFC."""
    path = PurePosixPath(os.path.normpath(given).replace(os.sep, "/"))
    if root is not None and path.is_absolute():
        top = PurePosixPath(os.path.abspath(root).replace(os.sep, "/"))
        path = path.relative_to(top) if path.is_relative_to(top) else path
    # A Mac's file names may be decomposed where the data's are not; bytes may be no UTF-8 at all.
    name = unicodedata.normalize("NFC", str(path))
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def canonical(value: Any, sort: bool = True) -> str:
    """One text for one value."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), ensure_ascii=False)


def _parse(raw: bytes) -> Header:
    metadata = json.loads(raw[8:])["__metadata__"]
    start = len(raw)
    rows = []
    for sha256, plan, grid, size, views in json.loads(metadata["rows"]):
        found = [View(start + v[0], v[1], v[2], (v[3][0], v[3][1])) for v in views]
        rows.append(Row(sha256, plan, (grid[0], grid[1]), tuple(size) if size else None, found))
    found = json.loads(metadata["sources"])
    sources = [Source(n, s, t, sha, "", *plan) for n, s, t, sha, *plan in found]
    found = json.loads(metadata["failures"])
    sources += [Source(n, s, t, None, why, *plan) for n, s, t, why, *plan in found]
    about = json.loads(metadata["about"])
    return Header(about, rows, sources, start, described=metadata["codec"])


def _listed(source: Source, what: str | None) -> list[Any]:
    """A source in a header; its plan only where it is not the usual one."""
    plan = [] if source.plan == PLAN else [source.plan]
    return [source.name, source.size, source.mtime_ns, what, *plan]


def _with_digest(raw: bytes, digest: str) -> bytes:
    start = 8 + len(_START)
    return raw[:start] + digest.encode() + raw[start + 64 :]


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(
        f"shard {path} is damaged: {what}. Delete that file and run the same "
        "`mlxvlm cache-embeddings` again: it encodes the shard's pictures anew."
    )
