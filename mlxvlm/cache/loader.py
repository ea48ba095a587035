"""Pictures, ahead of the encoder: threads that read, hash and tile, with NumPy only."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..data.origins import Origin, read_bytes
from ..errors import PictureError
from ..images.picture import Picture
from .format import Source


@dataclass
class Loaded:
    """A source, and its picture unless it is stored already or could not be read."""

    source: Source
    picture: Picture | None


class Loader:
    """Loads pictures in order, at most `depth` of them ahead of who asks.

    known: whether a content needs no picture, because it is stored or about to be.
    max_tiles: the most tiles a picture may have; None is the tiling's own limit.
    """

    def __init__(
        self,
        encoder: Any,
        known: Callable[[str], bool],
        workers: int,
        depth: int,
        max_tiles: int | None = None,
    ):
        self.encoder = encoder
        self.known = known
        self.depth = depth
        self.options = {} if max_tiles is None else {"max_tiles": max_tiles}
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="mlxvlm-look")

    def load(self, jobs: Iterable[tuple[str, Origin]]) -> Iterator[Loaded]:
        waiting: deque[Future[Loaded]] = deque()
        for name, origin in jobs:
            waiting.append(self._pool.submit(self._look, name, origin))
            if len(waiting) > self.depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look(self, name: str, origin: Origin) -> Loaded:
        source = Source(name, None, None)
        try:
            data, (source.size, source.mtime_ns) = read_bytes(origin)
            sha256 = hashlib.sha256(data).hexdigest()
            picture = None if self.known(sha256) else self.encoder.look([data], **self.options)[0]
        except OSError as error:
            source.reason = error.strerror or str(error)
            return Loaded(source, None)
        except PictureError as error:
            source.reason = str(error).replace("the picture in memory", "it").rstrip(".")
            return Loaded(source, None)
        source.sha256 = sha256
        if picture is not None:
            picture.sha256 = sha256
        return Loaded(source, picture)
