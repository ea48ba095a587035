"""A shard being written: records stream into a file beside, which gets its name when complete."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..images.picture import Picture
from .codecs import Codec
from .durable import PARTIAL, publish, sync, write_all
from .format import PLAN, SHARDS, Header, Row, Source, View, build_header, shard_name

_COPY = 1 << 22


class ShardWriter:
    """Writes shard `number` of a cache: `add` its pictures in order, then `finish` it.

    The header comes first in the file but is known last, so room for it is reserved by an estimate
    that only the input decides. Where tiling made more views than that, the data are moved once.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        about: dict[str, Any],
        codec: Codec,
        names: list[str],
    ):
        self.path = folder / SHARDS / shard_name(number)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.about = about
        self.codec = codec
        self.rows: list[Row] = []
        self.size = 0
        self._names = names
        self._reserved = 0
        self._fd: int | None = None

    def add(self, picture: Picture, views: list[np.ndarray], plan: str = PLAN) -> int:
        """Appends one picture's features, float32 [tokens, width] each; returns their bytes.

        Unfit: the codec cannot hold them; nothing is written then.
        """
        assert picture.sha256 is not None
        encoded = [self.codec.encode(view) for view in views]
        if self._fd is None:
            self._open(len(views))
        row = Row(picture.sha256, plan, picture.grid, picture.size)
        before = self.size
        for view, record in zip(views, encoded, strict=True):
            data = record.reshape(-1).view(np.uint8).data
            write_all(self._fd, data)  # type: ignore[arg-type]
            row.views.append(
                View(self.size, len(data), zlib.crc32(data), (view.shape[0], view.shape[1]))
            )
            self.size += len(data)
        self.rows.append(row)
        return self.size - before

    def finish(self, sources: list[Source]) -> Path:
        """Writes the header, syncs, and renames: from here on the shard exists."""
        if self._fd is None:
            self._open(1)
        assert self._fd is not None
        header = build_header(
            Header(self.about, self.rows, sources), self.codec, reserved=self._reserved
        )
        if len(header) > self._reserved:
            self._move(len(header))
        os.lseek(self._fd, 0, os.SEEK_SET)
        write_all(self._fd, header)
        sync(self._fd)
        os.close(self._fd)
        self._fd = None
        publish(self.partial, self.path)
        return self.path

    def abandon(self) -> None:
        """Drops what was written; does nothing to a finished shard."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self.partial.unlink(missing_ok=True)

    def _open(self, views_each: int) -> None:
        names = sum(len(json.dumps(name)) + 160 for name in self._names)
        pictures = len(self._names) * (160 + 260 * views_each)
        about = 2 * len(json.dumps(self.about))
        self._reserved = -(-(4096 + about + names + pictures) // 4096) * 4096
        self.partial.parent.mkdir(exist_ok=True)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.lseek(self._fd, self._reserved, os.SEEK_SET)

    def _move(self, start: int) -> None:
        """Moves the data back to `start`, the last piece first."""
        assert self._fd is not None
        for at in reversed(range(0, self.size, _COPY)):
            piece = os.pread(self._fd, min(_COPY, self.size - at), self._reserved + at)
            os.lseek(self._fd, start + at, os.SEEK_SET)
            write_all(self._fd, piece)
        self._reserved = start
