"""Pictures, ahead of the encoder: threads that read, hash and tile, with NumPy only."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..data.origins import read_bytes
from ..errors import PictureError
from ..images.picture import Picture
from .format import Source
from .jobs import Job


@dataclass
class Loaded:
    """A source, and its picture unless it is stored already or could not be read."""

    source: Source
    picture: Picture | None


def look(encoder: Any, data: bytes, limit: int | None) -> Picture:
    """A picture from its file's bytes, in at most `limit` tiles."""
    options = {} if limit is None else {"max_tiles": limit}
    return encoder.look([data], **options)[0]


class Loader:
    """Loads pictures in order, at most `depth` of them ahead of who asks.

    known: whether a content needs no picture under a plan, because it is stored or about to be.
    """

    def __init__(
        self,
        encoder: Any,
        known: Callable[[str, str], bool],
        workers: int,
        depth: int,
    ):
        self.encoder = encoder
        self.known = known
        self.depth = depth
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="mlxvlm-look")

    def load(self, jobs: Iterable[Job]) -> Iterator[Loaded]:
        waiting: deque[Future[Loaded]] = deque()
        for job in jobs:
            waiting.append(self._pool.submit(self._look, job))
            if len(waiting) > self.depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look(self, job: Job) -> Loaded:
        source = Source(job.name, None, None, plan=job.plan)
        try:
            data, (source.size, source.mtime_ns) = read_bytes(job.origin)
            sha256 = hashlib.sha256(data).hexdigest()
            picture = None
            if not self.known(sha256, job.plan):
                picture = look(self.encoder, data, job.limit)
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
