"""How a damaged index is told: by a crc32 in each row, and one of the file in its own header."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Bytes of a database's header: the change counter, user_version, and what repeats the counter.
_UNSEALED = ((24, 28), (60, 64), (92, 100))


class IndexDamaged(Exception):
    """The index cannot be believed: rebuild it. Never reaches a user."""


@contextmanager
def trouble() -> Iterator[None]:
    """What SQLite says of a damaged file, as IndexDamaged."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # it may quote what is damaged
        raise IndexDamaged from error


def checksum(path: Path) -> int:
    """crc32 of a database as a signed number, without what setting user_version changes."""
    total = 0
    with open(path, "rb") as file:
        head = bytearray(file.read(100))
        for start, stop in _UNSEALED:
            head[start:stop] = bytes(stop - start)
        total = zlib.crc32(head)
        while piece := file.read(1 << 20):
            total = zlib.crc32(piece, total)
    return total - (1 << 32) if total >> 31 else total


def crc(values: tuple[Any, ...]) -> int:
    """crc32 of a row."""
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


def sound(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row without its crc32, which must be right."""
    if crc(row[:-1]) != row[-1]:
        raise IndexDamaged
    return row[:-1]
