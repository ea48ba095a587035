"""Parquet with pictures inside, as Hugging Face datasets store it.

A column of structs {bytes, path}, or of lists of them, or one of bytes named as a picture is. What
is beside it may be any form of `records`, or a `caption`. A column of names, or of lists of them,
is what a row says of pictures that lie elsewhere.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, PictureError
from .archives import Entry
from .origins import Cell, Origin
from .records import FORMS

TEXTS = (*FORMS, "completion", "image_info", "caption", "id", "targets")
# Columns of plain bytes that hold a picture.
PICTURES = ("image", "images", "img", "picture", "image_bytes", "jpg", "jpeg", "png", "webp")
# Row groups kept: pictures are asked for in order by threads that are a few rows apart.
KEPT = 2


def read_parquet(path: Path) -> Iterator[Entry]:
    """The rows of a parquet file, without reading the pictures."""
    try:
        file = _open(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        yield Entry(path.name, row=DataError(f"{path.name}: it cannot be read ({error})."))
        return
    with file:
        columns = _picture_columns(file.schema_arrow)
        texts = [name for name in TEXTS if name in file.schema_arrow.names]
        texts += _name_columns(file.schema_arrow)
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            try:
                yield from _read_group(path, file, group, number, columns, texts)
            except (OSError, ValueError) as error:
                where = f"{path.name}[{number}:{number + size}]"
                yield Entry(where, row=DataError(f"{where}: they cannot be read ({error})."))
            number += size


def read_cell(cell: Cell) -> bytes:
    """One picture's bytes."""
    try:
        value = _groups.get(cell.file, cell.group, cell.column)[cell.row].as_py()
    except (OSError, ValueError) as error:
        raise PictureError(f"{cell.file} cannot be read ({error})") from None
    if cell.place is not None:
        value = value[cell.place] if value and cell.place < len(value) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise PictureError("there are no bytes in its cell")
    return data


def _read_group(
    path: Path, file: Any, group: int, first: int, columns: list[tuple[str, bool]], texts: list[str]
) -> Iterator[Entry]:
    # Of a struct its path alone tells whether there is a picture; of plain bytes they are read.
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    wanted = list(texts)
    for column, _ in columns:
        paths = [p for p in leaves if p.startswith(f"{column}.") and p.endswith(".path")]
        wanted += paths or [p for p in leaves if p == column or p.startswith(f"{column}.")]
    outside = {column for column, _ in columns if _is_outside(file, group, column)}
    table = file.read_row_group(group, columns=wanted)
    archive = str(path)  # one for all cells
    for row in range(table.num_rows):
        entry = Entry(f"{path.name}[{first + row}]")
        for column, several in columns:
            value = table.column(column)[row].as_py()
            found = list(enumerate(value or [])) if several else [(None, value)]
            for place, one in found:
                if one is None:
                    continue
                number = f"{first + row}" if place is None else f"{first + row}.{place}"
                known = one.get("path") if isinstance(one, dict) else None
                origin: Origin = Cell(archive, group, row, column, place)
                if column in outside and known:
                    origin = str(path.parent / known)
                entry.pictures.append(
                    (number if len(columns) == 1 else f"{number}.{column}", origin)
                )
                if known:
                    entry.also.append(known)
        if len(entry.also) != len(entry.pictures):
            entry.also = []  # they go with the pictures one by one
        try:
            entry.row = _row({name: table.column(name)[row].as_py() for name in texts})
        except ValueError as error:
            entry.row = DataError(f"{entry.where}: its text is not JSON: {error}.")
        yield entry


def _picture_columns(schema: Any) -> list[tuple[str, bool]]:
    """(column, whether it holds lists) of every column of pictures."""
    import pyarrow.types as types

    found = []
    for field in schema:
        kind, several = field.type, False
        if types.is_list(kind) or types.is_large_list(kind):
            kind, several = kind.value_type, True
        if types.is_struct(kind):
            inside = [kind.field(i) for i in range(kind.num_fields)]
            if any(child.name == "bytes" and _is_bytes(child.type) for child in inside):
                found.append((field.name, several))
        elif _is_bytes(kind) and field.name.lower() in PICTURES:
            found.append((field.name, several))
    return found


def _name_columns(schema: Any) -> list[str]:
    """Columns that name pictures which lie elsewhere."""
    import pyarrow.types as types

    found = []
    for name in ("image", "images"):
        if name in schema.names:
            kind = schema.field(name).type
            kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
            if types.is_string(kind) or types.is_large_string(kind):
                found.append(name)
    return found


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_outside(file: Any, group: int, column: str) -> bool:
    """Whether pictures lie in files beside: every cell of bytes is empty, as the statistics say."""
    about = file.metadata.row_group(group)
    for i in range(about.num_columns):
        one = about.column(i)
        parts = one.path_in_schema.split(".")
        if parts[0] == column and parts[-1] == "bytes" and one.statistics is not None:
            return one.statistics.null_count == one.num_values
    return False


def _row(values: dict[str, Any]) -> dict[str, Any] | None:
    row = {name: _plain(value) for name, value in values.items() if value is not None}
    for name in ("messages", "conversations", "texts", "content", "image_info", "targets"):
        if isinstance(row.get(name), str):
            row[name] = json.loads(row[name])
    caption = row.pop("caption", None)
    if any(row.get(form) for form in FORMS):
        return row
    return row | {"text": caption} if caption else None


def _plain(value: Any) -> Any:
    """Without the fields that a struct has only for the sake of other rows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Groups:
    """Columns of the row groups that were read last; for any number of threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: str, group: int, column: str) -> Any:
        key = (file, group, column)
        with self._lock:  # whoever asks meanwhile most likely waits for the same one
            found = self._kept.pop(key, None)
            if found is None:
                while len(self._kept) >= KEPT:
                    self._kept.popitem(last=False)
                with _open(Path(file)) as opened:
                    found = opened.read_row_group(group, columns=[column]).column(column)
            self._kept[key] = found
            return found


_groups = _Groups()


def _open(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{path} is parquet, and reading that takes pyarrow: pip install 'mlxvlm[parquet]'."
        ) from None
    return ParquetFile(path, memory_map=True)
