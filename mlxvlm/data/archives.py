"""Rows and pictures in one file: WebDataset tars and parquet as Hugging Face datasets store it.

Both are read in place. A picture's name is the archive's name and what it is called inside,

    part-000.tar/000123.jpg        train-00000-of-00010.parquet/123

relative to the folder that was given, so that names stay what they are wherever that folder is.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .origins import Origin
from .records import FORMS

ARCHIVE_SUFFIXES = (".tar", ".parquet")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class Entry:
    """One sample of an archive.

    where: "part-000.tar/000123". pictures: (name inside the archive, origin). row: what stands
    beside them, its images named by `pictures`; None where nothing does, DataError where it cannot
    be read. also: other names under which the row's author knows its pictures, in their order.
    """

    where: str
    pictures: list[tuple[str, Origin]] = field(default_factory=list)
    row: dict[str, Any] | DataError | None = None
    also: list[str] = field(default_factory=list)


def find_archives(path: str | Path) -> tuple[Path, list[Path]]:
    """(what names are relative to, archives): of an archive, a folder of them, or a pattern."""
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_archive(p) and _seen(p, path))
        # img2dataset puts 00000.parquet, which has no pictures, beside 00000.tar.
        return path, [p for p in found if p.suffix == ".tar" or p.with_suffix(".tar") not in found]
    if path.is_file():
        if path.name.lower().endswith(_PACKED):
            raise DataError(
                f"{path} is compressed, and a picture inside cannot be read in place: decompress "
                "it to a .tar (gunzip, unzstd)."
            )
        return path.parent, [path] if _is_archive(path) else []
    if glob.has_magic(path.name):
        found = sorted(p for p in path.parent.glob(path.name) if _is_archive(p))
        if not found:
            raise DataError(f"no .tar or .parquet file matches {path}.")
        return path.parent, found
    return path.parent, []


def read_entries(archive: Path) -> Iterator[Entry]:
    """The samples of one archive in order; what cannot be read comes as an Entry with its error."""
    if archive.suffix.lower() == ".tar":
        from .tars import read_tar as read
    else:
        from .parquet import read_parquet as read
    return read(archive)


def pictures_of(archive: Path) -> dict[str, Origin]:
    """Every picture of an archive by its name inside."""
    found: dict[str, Origin] = {}
    for entry in read_entries(archive):
        for name, origin in entry.pictures:
            found.setdefault(name, origin)
    return found


def _without_text(entry: Entry) -> DataError:
    known = ", ".join(map(repr, (*FORMS, "caption")))
    return DataError(
        f"{entry.where}: there is no text beside the picture; rows have it under one of {known}."
    )


def read_archive_rows(
    root: Path, archives: list[Path]
) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(where, row) of each sample, its images named as above; a picture alone is no row."""
    for archive in archives:
        prefix = archive.relative_to(root).as_posix()
        for entry in read_entries(archive):
            if isinstance(entry.row, DataError):
                yield entry.where, entry.row
            elif entry.row is None:
                yield entry.where, _without_text(entry)
            else:
                yield entry.where, with_pictures(entry, prefix)


def with_pictures(entry: Entry, prefix: str) -> dict[str, Any]:
    """The row of an entry, its pictures under the names they have from outside; of an entry without
    pictures as it is, for it may name some that lie elsewhere."""
    assert isinstance(entry.row, dict)
    if not entry.pictures:
        return entry.row
    row = {name: value for name, value in entry.row.items() if name != "image"}
    return row | {"images": [f"{prefix}/{name}" for name, _ in entry.pictures]}


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def _seen(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in os.path.relpath(path, folder).split(os.sep))
