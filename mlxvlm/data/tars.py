"""WebDataset tars: members that share a name up to its first dot are one sample.

000123.jpg    a picture, by its suffix; 000123.0.jpg, 000123.1.jpg are two of one sample
000123.json   a row, or what img2dataset knows of the picture
000123.txt    a caption, where the .json has nothing to learn from
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .archives import Entry
from .origins import Member
from .records import FORMS

PICTURES = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|p[pgb]m|avif|jp2)$", re.IGNORECASE)
_BLOCK = 512
_MOST_TEXT = 64 * 2**20


def read_tar(path: Path) -> Iterator[Entry]:
    """The samples of a tar. A damaged one gives what lies before the damage, then its error."""
    try:
        file = path.open("rb")
    except OSError as error:
        yield Entry(path.name, row=DataError(f"{path.name}: it cannot be read: {error.strerror}."))
        return
    damage: list[str] = []
    tar = str(path)  # one for all members
    with file:
        for key, members in groupby(_members(file, damage), lambda member: member[0]):
            entry = _entry(tar, f"{path.name}/{key}", members, file)
            if entry:
                yield entry
    if damage:
        yield Entry(path.name, row=DataError(f"{path.name}: {damage[0]}"))


def _members(file: IO[bytes], damage: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """(key, name, offset, size) of every file; what ends them early goes into `damage`."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
    except (tarfile.TarError, OSError) as error:
        if file.seek(0, 2):  # tarfile calls an empty file damaged, and so do we
            error = str(error) or type(error).__name__
        damage.append(f"it is no tar, or is compressed ({error}).")
        return
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            damage.append(f"it is damaged or cut short ({error}).")
            return
        if member is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every one
        if member.isreg() and not member.issparse():
            name = posixpath.normpath(member.name)
            folder, base = posixpath.split(name)
            if not base.startswith("."):  # a Mac's ._000123.jpg is no picture
                yield (
                    posixpath.join(folder, base.split(".")[0]),
                    name,
                    member.offset_data,
                    member.size,
                )
    file.seek(tar.offset)
    if file.read(_BLOCK).strip(b"\0"):  # tarfile takes a bad header for the end
        damage.append(f"it is damaged at byte {tar.offset:,}: what follows is not seen.")


def _entry(tar: str, where: str, members: Iterator[Any], file: IO[bytes]) -> Entry | None:
    entry = Entry(where)
    texts: dict[str, bytes] = {}
    for _, name, offset, size in members:
        if PICTURES.search(name):
            entry.pictures.append((name, Member(tar, offset, size)))
        elif name.lower().endswith((".json", ".txt")) and size <= _MOST_TEXT:
            place = file.tell()
            file.seek(offset)
            texts[name.lower().rsplit(".", 1)[1]] = file.read(size)
            file.seek(place)
    if not entry.pictures and not texts:
        return None
    try:
        entry.row, entry.also = _row(texts)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        entry.row = DataError(f"{where}: its .json or .txt cannot be read: {error}.")
    return entry


def _row(texts: dict[str, bytes]) -> tuple[dict[str, Any] | None, list[str]]:
    """(row, other names of its pictures)."""
    row: Any = json.loads(texts["json"].decode("utf-8-sig")) if "json" in texts else {}
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not a {type(row).__name__}")
    named = row.pop("image", None) or row.pop("images", None) or []
    row.pop("images", None)
    also = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    also = [name for name in also if isinstance(name, str) and name]
    if not any(row.get(form) for form in FORMS):
        caption = texts["txt"].decode("utf-8-sig").strip() if "txt" in texts else row.get("caption")
        row = {"text": caption, "id": row.get("id")} if caption else None
    return row, also
