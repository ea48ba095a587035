"""Files of rows and folders of pictures.

A bad row never ends a run: it comes out as a DataError in the place of its row, for the caller to
count and report. A file that cannot be read at all is raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .archives import find_archives, read_archive_rows
from .json_list import read_list
from .origins import Origin, locate
from .records import Record, parse_record
from .urls import is_url, local

ROW_SUFFIXES = (".jsonl", ".json")
MAIN_ROWS = ("train.jsonl", "train.json")
PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .avif .jp2".split()
)


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(where, row) of each row; an unreadable row is a DataError instead.

    path: a .json list, a .jsonl file, or a folder with train.jsonl, train.json or a single such
    file; or WebDataset tars or parquet, as `archives` finds them. `where` is "name:line" (.jsonl),
    "name[index]" (.json, .parquet) or "name/key" (.tar).
    """
    root, archives = archives_of(path)
    if archives:
        return read_archive_rows(root, archives)
    path = find_rows(path)
    return _read_lines(path) if path.suffix.lower() == ".jsonl" else _read_list(path)


def read_rows(path: str | Path) -> Iterator[tuple[str, Record | DataError]]:
    """`read_records`, each row parsed."""
    for where, raw in read_records(path):
        if isinstance(raw, DataError):
            yield where, raw
            continue
        try:
            yield where, parse_record(raw, where)
        except DataError as error:
            yield where, error


def archives_of(path: str | Path) -> tuple[Path, list[Path]]:
    """`find_archives`, but a folder's own train.jsonl or train.json comes before its archives."""
    path = Path(path)
    if any((path / name).is_file() for name in MAIN_ROWS):
        return path, []
    return find_archives(path)


def picture_root(data: str | Path, images: str | Path | None = None) -> Path:
    """What the names in `data` are relative to: `images`, else the data's own folder.

    Pictures inside archives go with the data, wherever `images` is.
    """
    root, archives = archives_of(data)
    return root if archives or not images else Path(images)


def finder(
    data: str | Path, images: str | Path | None = None, allow_urls: bool = False
) -> Callable[[str], Origin]:
    """What gives the origin of a name in `data`: inside its archives, else under `images` or beside
    the data, or on the web where that is allowed."""
    root, archives = archives_of(data)
    outside = Path(images) if images else root

    def find(name: str) -> Origin:
        if is_url(name):
            if not allow_urls:
                raise DataError(
                    f"{name} is a web address, and none is fetched unasked: --allow-urls.",
                    kind="picture",
                )
            return local(name)
        if archives:
            origin = locate(root, name)
            if not isinstance(origin, Path) or origin.exists():
                return origin
        return locate(outside, name)

    return find


def find_rows(path: str | Path) -> Path:
    """The file of rows that `path` is or holds."""
    path = Path(path)
    if path.is_dir():
        for name in MAIN_ROWS:
            if (path / name).is_file():
                return path / name
        files = sorted(
            p for p in path.iterdir() if p.suffix.lower() in ROW_SUFFIXES and p.is_file()
        )
        if len(files) == 1:
            return files[0]
        found = ", ".join(p.name for p in files[:5]) or "none"
        raise DataError(
            f"{path} must hold train.jsonl, train.json or a single .json or .jsonl file; "
            f"found: {found}."
        )
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if path.suffix.lower() not in ROW_SUFFIXES:
        raise DataError(
            f"{path} must be a .json, .jsonl, .tar or .parquet file, or a folder that holds one."
        )
    return path


def list_pictures(folder: str | Path) -> list[Path]:
    """Every picture under a folder, by its suffix, sorted by path; hidden ones are left out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path.name}:{number}"
                    yield where, _read_line(line, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _read_line(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 at byte {error.start}.")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON: {error}.")
    return _row(row, where)


def _read_list(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        for index, row in enumerate(read_list(path)):
            where = f"{path.name}[{index}]"
            yield where, _row(row, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except TypeError as error:
        raise DataError(f"{path} must hold a JSON list of rows, not a {error}.") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(
            f"{path} is not JSON: {error}. One object a line? Name it .jsonl."
        ) from None


def _row(row: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"{where}: a row must be a JSON object, not a {type(row).__name__}.")
