"""A shard being written: records stream into a file beside, which gets its name when complete."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..durable import PARTIAL, publish, sync, write_all
from ..images.picture import Picture
from .codecs import Codec, describe_codec, record_size, settled
from .format import PLAN, SHARDS, Header, Row, Source, View, build_header, shard_name
from .whitening import Calibration

_COPY = 1 << 22
CALIBRATION_VIEWS = 512


class ShardWriter:
    """Writes shard `number` of a cache: `add` its pictures in order, then `finish` it.

    The header comes first in the file but is known last, so room for it is reserved by an estimate
    that only the input decides. Where tiling made more views than that, the data are moved once.

    A codec that has no mean and scale yet gets them from the shard's first CALIBRATION_VIEWS views,
    or from all if there are fewer: they wait as float32 in a file without a name, which goes away
    with the process, and are encoded then. `codec` is from there on the one for later shards too.
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
        self._waiting: _Waiting | None = None

    def add(self, picture: Picture, views: list[np.ndarray], plan: str = PLAN) -> int:
        """Appends one picture's features, float32 [tokens, width] each; returns their bytes.

        Unfit: the codec cannot hold them; nothing is written then.
        """
        assert picture.sha256 is not None
        row = Row(picture.sha256, plan, picture.grid, picture.size)
        if self.codec.whitened and self.codec.whitening is None:
            if self._waiting is None:
                self._waiting = _Waiting(self.path.parent)
            self._waiting.add(views)
            shapes = [(view.shape[0], view.shape[1]) for view in views]
            row.views = [View(0, record_size(self.codec, s), 0, s) for s in shapes]
            self.rows.append(row)
            if self._waiting.calibration.views >= CALIBRATION_VIEWS:
                self._settle()
        else:
            # All of them before the first is written: any may turn out to be Unfit.
            encoded = [self.codec.encode(view) for view in views]
            for view, record in zip(views, encoded, strict=True):
                row.views.append(self._append(record, (view.shape[0], view.shape[1]), len(views)))
            self.rows.append(row)
        return sum(view.size for view in row.views)

    def finish(self, sources: list[Source]) -> Path:
        """Writes the header, syncs, and renames: from here on the shard exists."""
        if self._waiting:
            self._settle()
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
        if self._waiting:
            self._waiting.close()
            self._waiting = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self.partial.unlink(missing_ok=True)

    def room(self, views_each: int) -> int:
        """Bytes kept for the header, if every picture has so many views."""
        names = sum(len(json.dumps(name)) + 160 for name in self._names)
        tensors = len(self.codec.parts((1, 1)))
        pictures = len(self._names) * (160 + (120 + 140 * tensors) * views_each)
        about = 2 * len(json.dumps(self.about)) + 2 * len(json.dumps(describe_codec(self.codec)))
        return -(-(4096 + about + names + pictures) // 4096) * 4096

    def _append(self, record: np.ndarray, shape: tuple[int, int], views_each: int) -> View:
        if self._fd is None:
            self._open(views_each)
        assert self._fd is not None
        data = record.reshape(-1).view(np.uint8).data
        write_all(self._fd, data)
        view = View(self.size, len(data), zlib.crc32(data), shape)
        self.size += len(data)
        return view

    def _settle(self) -> None:
        """Fixes the codec's mean and scale, and encodes the views that waited for them."""
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        try:
            self.codec = settled(self.codec, waiting.calibration.whitening())
            for row in self.rows:
                row.views = [
                    self._append(self.codec.encode(waiting.read(v.shape)), v.shape, len(row.views))
                    for v in row.views
                ]
        finally:
            waiting.close()

    def _open(self, views_each: int) -> None:
        self._reserved = self.room(views_each)
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


class _Waiting:
    """Views waiting for their codec to be calibrated, in a file without a name."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.calibration = Calibration()
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, suffix=PARTIAL, buffering=0)
        self._at = 0

    def add(self, views: list[np.ndarray]) -> None:
        """All of a picture's views, or Unfit and none."""
        self.calibration.check(views)
        for view in views:
            self.calibration.add(view)
            write_all(self._file.fileno(), np.ascontiguousarray(view, "<f4").reshape(-1).data)

    def read(self, shape: tuple[int, int]) -> np.ndarray:
        """The next view, from the first on."""
        size = 4 * shape[0] * shape[1]
        data = os.pread(self._file.fileno(), size, self._at)
        self._at += size
        return np.frombuffer(data, "<f4").reshape(shape)

    def close(self) -> None:
        self._file.close()
