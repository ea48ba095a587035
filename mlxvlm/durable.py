"""Writing a file so that a reader sees it whole or not at all, even after a power cut."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

PARTIAL = ".partial"


def is_full(error: Exception) -> bool:
    """Whether an OSError or SQLite error says that the disk, or our share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # SQLite tells a full disk from a spent quota or file size, which it calls a failed write.
    name = getattr(error, "sqlite_errorname", "")
    return name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE") or "disk is full" in str(error)


def sync(fd: int) -> None:
    """Flushes a file to the medium itself, past the drive's own memory where that is possible."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # not every file system has it; fsync is the next best
    os.fsync(fd)


def sync_path(path: Path) -> None:
    """`sync` of a file by its path, or of a folder, which makes the names in it last."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Renames a synced file to its name, and makes the name last."""
    os.replace(partial, final)
    sync_path(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, syncs it, and renames it."""
    partial = path.with_name(path.name + PARTIAL)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)
    publish(partial, path)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """os.write, until everything is written."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]
