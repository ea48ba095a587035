"""Where the bytes of a picture are: in a file, in a tar or in a cell of a parquet file.

Nothing is ever unpacked. An origin is small, since a run holds one for each of its pictures.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import PictureError


class Member(NamedTuple):
    """`size` bytes of a tar, from `offset`."""

    tar: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar} at byte {self.offset:,}"


class Cell(NamedTuple):
    """A row of a row group of a parquet file; of a list, the picture at `place`."""

    file: str
    group: int
    row: int
    column: str
    place: int | None = None

    def __str__(self) -> str:
        place = "" if self.place is None else f"[{self.place}]"
        return f"{self.file}, row group {self.group}, row {self.row}, {self.column}{place}"


Origin = str | os.PathLike[str] | Member | Cell


def state_of(origin: Origin) -> tuple[int, int]:
    """(size, mtime_ns): where they are as they were, so is the picture. OSError if it is gone."""
    if isinstance(origin, Member):
        return origin.size, os.stat(origin.tar).st_mtime_ns
    state = os.stat(origin.file if isinstance(origin, Cell) else origin)
    return state.st_size, state.st_mtime_ns


def read_bytes(origin: Origin) -> tuple[bytes, tuple[int, int]]:
    """A picture's bytes, and the state that they were read in. OSError or PictureError."""
    if isinstance(origin, Cell):
        from .parquet import read_cell

        state = state_of(origin)
        return read_cell(origin), state
    path = origin.tar if isinstance(origin, Member) else origin
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PictureError("it is not a file")  # and a pipe would wait for ever
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
        if not isinstance(origin, Member):
            return file.read(), (state.st_size, state.st_mtime_ns)
        data = os.pread(file.fileno(), origin.size, origin.offset)
    if len(data) != origin.size:
        raise PictureError(f"{path} ends before it does")
    return data, (origin.size, state.st_mtime_ns)


def locate(root: Path, name: str) -> Origin:
    """The origin of a name as data have it: a path under `root`, which may lead into an archive.

    `part-000.tar/000123.jpg` is a member; a name that leads nowhere comes back as a path.
    """
    path = root / name
    parts = PurePosixPath(name).parts
    for at, part in enumerate(parts[:-1], 1):
        if part.lower().endswith((".tar", ".parquet")):
            archive = root.joinpath(*parts[:at])
            if archive.is_file():
                inside = _inside(str(archive), archive.stat().st_mtime_ns)
                return inside.get("/".join(parts[at:]), path)
    return path


@lru_cache(maxsize=64)
def _inside(archive: str, mtime_ns: int) -> Mapping[str, Origin]:
    from .archives import pictures_of

    return pictures_of(Path(archive))
