"""Reading records from shards, each checked against its crc32."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CacheError
from .format import SHARDS, View, read_header, shard_name

if TYPE_CHECKING:
    from .codecs import Codec

OPEN_SHARDS = 64  # a Mac gives a process 256 file descriptors unless it asks for more


class OpenShards:
    """The shards of a folder, the most recently read ones open. For any number of threads."""

    def __init__(self, folder: Path, limit: int = OPEN_SHARDS):
        self.folder = folder
        self.limit = limit
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._codecs: dict[tuple[int, ...], Codec] = {}
        self._lock = threading.Lock()

    def read(self, number: int, view: View, label: str) -> bytes:
        """A view's record. `label` names its picture in errors."""
        return self.open(number).read(view, label)

    def codec(self, shard: OpenShard) -> Codec:
        """A shard's codec with the mean and scale in its header, which is read once for all."""
        # By file, not by number: a shard may be replaced, and few of many stay open.
        codec = self._codecs.get(shard.identity)
        if codec is None:
            codec = read_header(shard.path).codec
            if identity(os.stat(shard.path)) != shard.identity:
                raise CacheError(f"shard {shard.path} was replaced while it was read: try again.")
            self._codecs[shard.identity] = codec
        return codec

    def open(self, number: int) -> OpenShard:
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                shard = OpenShard(self.folder / SHARDS / shard_name(number))
            self._open[number] = shard
            if len(self._open) > self.limit:
                self._open.popitem(last=False)
        return shard

    def close(self) -> None:
        with self._lock:
            self._open.clear()


class OpenShard:
    """An open shard. It closes with its last reader, which may outlive its place in the list."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
            state = os.fstat(self._fd)
        except OSError as error:
            raise CacheError(f"shard {path} cannot be opened: {error.strerror}.") from None
        self.identity = identity(state)

    def read(self, view: View, label: str) -> bytes:
        try:
            data = os.pread(self._fd, view.size, view.offset)
        except OSError as error:
            raise CacheError(
                f"{label} cannot be read from shard {self.path}: {error.strerror}."
            ) from None
        if len(data) != view.size or zlib.crc32(data) != view.crc32:
            raise CacheError(
                f"the features of {label} in shard {self.path} are damaged: their checksum does "
                "not match. `mlxvlm cache repair` encodes them again from their pictures."
            )
        return data

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def identity(state: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one that took its name."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
