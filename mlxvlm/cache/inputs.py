"""What there is to cache: the pictures that a folder or a file of rows names."""

from __future__ import annotations

from pathlib import Path

from ..data.sources import find_rows, list_pictures, read_rows
from ..errors import DataError


def picture_sources(
    data: str | Path, images: str | Path | None = None
) -> tuple[list[tuple[str, Path]], list[tuple[str, str]]]:
    """((name, path) of each picture, in order of first appearance; (where, reason) of bad rows).

    data: a folder of pictures, or rows as training reads them (.json, .jsonl, or a folder with
        train.jsonl or train.json). Rows without pictures are passed over.
    images: what the rows' names are relative to; the data's own folder by default. Names stay as
        the data have them, so that training looks them up as they are.
    """
    data = Path(data)
    if data.is_dir() and not any((data / n).is_file() for n in ("train.jsonl", "train.json")):
        pictures = list_pictures(data)
        if pictures:
            return [(path.relative_to(data).as_posix(), path) for path in pictures], []
    rows = find_rows(data)
    root = Path(images) if images else rows.parent
    if not root.is_dir():
        raise DataError(f"--images must name a folder, and {root} is none.")
    found: dict[str, Path] = {}
    bad: list[tuple[str, str]] = []
    for where, record in read_rows(rows):
        if isinstance(record, DataError):
            bad.append((where, str(record).removeprefix(f"{where}: ")))
            continue
        for name in record.images:
            found.setdefault(name, root / name)
    if not found:
        raise DataError(f"{rows} names no pictures: there is nothing to cache.")
    return list(found.items()), bad
