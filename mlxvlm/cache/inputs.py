"""What there is to cache: the pictures that folders, rows and archives name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..data.archives import read_entries, with_pictures
from ..data.origins import locate
from ..data.records import parse_record
from ..data.sources import (
    MAIN_ROWS,
    archives_of,
    find_rows,
    list_pictures,
    read_rows,
)
from ..data.urls import fetch_all, is_url, local
from ..errors import DataError, PictureError
from .jobs import Named

BadRows = list[tuple[str, str]]


def picture_sources(
    data: str | Path | list[Path],
    images: str | Path | None = None,
    trust_names: bool = False,
    allow_urls: bool = False,
) -> tuple[list[Named], BadRows]:
    """(pictures in order of first appearance, (where, reason) of bad rows).

    A picture that is in rows of one and in rows of three is there for each: for the first such row
    in its place, for others at the end.

    data: a folder of pictures; rows as training reads them (.json, .jsonl, or a folder with
        train.jsonl or train.json); WebDataset tars or parquet, one, or a folder of them. Several
        such are taken one after the other. Rows without pictures are passed over.
    images: what the rows' names are relative to; the data's own folder by default. Names stay as
        the data have them, so that training looks them up as they are.
    trust_names: the pictures themselves need not be there. allow_urls: those that rows name by a
        web address are fetched; otherwise their rows are bad.
    """
    found: dict[str, Named] = {}
    more: dict[tuple[str, int], Named] = {}
    bad: BadRows = []
    archives: dict[str, Path] = {}
    for one in data if isinstance(data, list) else [data]:
        for named in _sources(Path(one), images, trust_names, bad, archives, allow_urls):
            first = found.setdefault(named.name, named)
            if first.among != named.among:
                key = named.name, named.among
                more.setdefault(key, Named(named.name, first.origin, named.among))
    if not found:
        reason = f" ({len(bad):,} rows are bad; {bad[0][0]}: {bad[0][1]})" if bad else ""
        names = ", ".join(map(str, data)) if isinstance(data, list) else data
        raise DataError(f"{names} names no pictures{reason}: there is nothing to cache.")
    return [*found.values(), *more.values()], bad


def _sources(
    data: Path,
    images: str | Path | None,
    trust_names: bool,
    bad: BadRows,
    archives: dict[str, Path],
    allow_urls: bool,
) -> Iterator[Named]:
    if data.is_dir() and not any((data / name).is_file() for name in MAIN_ROWS):
        pictures = list_pictures(data)
        if pictures:
            for path in pictures:
                yield Named(path.relative_to(data).as_posix(), str(path))
            return
    top, inside = archives_of(data)
    for archive in inside:
        prefix = archive.relative_to(top).as_posix()
        if archives.setdefault(prefix, archive) != archive:
            raise DataError(
                f"{archives[prefix]} and {archive} have one name, and their pictures would too: "
                "name a folder that holds both."
            )
        outside = Path(images) if images else top
        yield from _in_archive(archive, prefix, outside, bad, allow_urls)
    if inside:
        return
    rows = find_rows(data)
    root = Path(images) if images else rows.parent
    if not root.is_dir() and not trust_names:
        raise DataError(
            f"--images must name a folder, and {root} is none. Where the pictures are gone but "
            "cached, add --trust-names."
        )
    for where, record in read_rows(rows):
        try:
            if isinstance(record, DataError):
                raise record
            yield from _named(record.images, root, allow_urls)
        except DataError as error:
            bad.append((where, str(error).removeprefix(f"{where}: ")))


def _in_archive(
    archive: Path, prefix: str, root: Path, bad: BadRows, allow_urls: bool
) -> Iterator[Named]:
    """Pictures by their place in the archive, and by the names that their rows give them; those
    that rows only name lie under `root`."""
    for entry in read_entries(archive):
        row = entry.row
        names = [f"{prefix}/{name}" for name, _ in entry.pictures]
        if isinstance(row, dict):
            try:
                record = parse_record(with_pictures(entry, prefix), entry.where)
                yield from _named([] if names else record.images, root, allow_urls)
            except DataError as error:
                row = error
        if isinstance(row, DataError):  # its pictures are good all the same
            bad.append((entry.where, str(row).removeprefix(f"{entry.where}: ")))
        # A picture that no row goes with is one that rows elsewhere name.
        among = len(names) if isinstance(row, dict) else 1
        for name, (_, origin) in zip(names, entry.pictures, strict=True):
            yield Named(name, origin, among)
        if len(entry.also) == len(names):
            for name, (_, origin) in zip(entry.also, entry.pictures, strict=True):
                yield Named(name, origin, among)


def _named(names: list[str], root: Path, allow_urls: bool) -> Iterator[Named]:
    """Pictures that a row names, each under `root` or, where that is allowed, fetched."""
    urls = [name for name in names if is_url(name)]
    if urls and not allow_urls:
        raise DataError(f"{urls[0]} is a web address, and none is fetched unasked: --allow-urls.")
    if urls:
        fetch_all(urls)
    for name in names:
        try:
            origin = local(name) if is_url(name) else locate(root, name)
        except PictureError as error:
            raise DataError(str(error)) from None
        origin = str(origin) if isinstance(origin, Path) else origin
        yield Named(name, origin, len(names))
