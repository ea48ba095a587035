"""One writer a cache.

The lock is the kernel's (flock), so that it dies with its holder however that dies: a file left
by a killed writer locks nothing. The pid inside only tells a second writer whom it met.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import CacheError

LOCK = "writer.lock"


class CacheBusy(CacheError):
    """Another process is writing this cache."""


class WriterLock:
    """`with WriterLock(folder):` or CacheBusy with the pid of the writer that holds it."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._fd: int | None = None

    def acquire(self) -> None:
        while self._fd is None:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
                os.close(fd)
                raise CacheBusy(
                    f"{self.path.parent} is being written by another process (pid {holder}): "
                    "wait for it to end, or stop it, and run this again."
                ) from None
            except OSError as error:
                os.close(fd)
                raise CacheError(
                    f"{self.path} cannot be locked ({error.strerror}): a cache is written on a "
                    "file system that has locks, such as a local disk."
                ) from None
            if not _is_at(fd, self.path):
                os.close(fd)  # its last holder removed it between our open and our lock
                continue
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
            self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> WriterLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
