"""The index: where each picture and name is. Derived from the shards, and disposable.

It is compared with the shards' names, sizes and times when it is opened, and brought up to date or
rebuilt where they disagree. Each row carries a crc32 of itself, so that a damaged index is noticed
at the row that is read and never sends anyone to a wrong record. Names in a later shard win over
those in an earlier one, but a failure never over a picture; of two records of one picture under one
tiling plan the earlier is used.

A damaged key hides its row, so that "not there" needs the whole index to be sound. A writer that
is done seals it with a crc32 of the file, kept in the file's own header: checking a million rows
that way takes a fraction of a second instead of ten.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import PARTIAL
from ..errors import CacheError
from .about import CACHE_JSON, differences
from .format import (
    PLAN,
    SHARDS,
    Row,
    Source,
    View,
    canonical,
    list_shards,
    read_header,
    shard_name,
)
from .integrity import IndexDamaged, checksum, crc, sound, trouble
from .lock import CacheBusy, WriterLock

INDEX = "index.sqlite"
SCHEMA = 2
KNOWN = " The index has the names of its pictures."
_TABLES = """
CREATE TABLE about (schema INTEGER, about TEXT);
CREATE TABLE shards (number INTEGER PRIMARY KEY, name TEXT, size INTEGER, mtime_ns INTEGER,
    pictures INTEGER, views INTEGER, problem TEXT, crc INTEGER);
CREATE TABLE pictures (sha256 TEXT, plan TEXT, shard INTEGER, row TEXT, crc INTEGER,
    PRIMARY KEY (sha256, plan)) WITHOUT ROWID;
CREATE TABLE names (name TEXT, size INTEGER, mtime_ns INTEGER, sha256 TEXT, reason TEXT, plan TEXT,
    shard INTEGER, crc INTEGER, PRIMARY KEY (name, plan)) WITHOUT ROWID;
CREATE INDEX failed ON names (name) WHERE sha256 IS NULL;
"""


@dataclass
class Totals:
    """What a cache holds. tilings: pictures, each as often as it has tiling plans."""

    shards: int
    pictures: int
    tilings: int
    views: int
    bytes: int
    names: int
    failures: int


class Index:
    """An open index. Lookups may come from any thread; they raise IndexDamaged, or are right."""

    def __init__(self, folder: Path, about: dict[str, Any], path: Path | str):
        self.folder = folder
        self.about = about
        self.path = path
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=30, check_same_thread=False)
        # A killed process leaves it whole; what a power cut leaves is checked, and can be rebuilt.
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA cache_size = -32768")  # KiB; keys come in no order

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], distrust: bool = False) -> Index:
        """For a reader: mended on disk, or made anew in memory where the disk is not ours to write.

        distrust: rebuild it, whatever it looks like.
        """
        index = None if distrust else cls._existing(folder, about)
        state = index._state() if index else "wrong"
        if index and state == "current":
            return index
        try:
            with WriterLock(folder):
                if index:
                    index.close()
                return cls.open_for_writing(folder, about, distrust)
        except CacheBusy:
            # The writer is about to take in the shard that the index is behind by.
            if index and state == "behind":
                return index
        except (PermissionError, sqlite3.OperationalError):
            pass
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        index = cls(folder, about, ":memory:")
        index._fill()
        return index

    @classmethod
    def open_for_writing(
        cls, folder: Path, about: dict[str, Any], distrust: bool = False, renew: bool = False
    ) -> Index:
        """For the holder of the writer's lock. renew: rebuild it, but believe the names in it."""
        index = None if distrust or renew else cls._existing(folder, about)
        if index:
            state = index._state()
            if state == "current":
                return index
            if state == "behind":
                try:
                    for number in sorted(set(list_shards(folder)) - set(index._stored())):
                        index.add(number)
                    return index
                except (IndexDamaged, sqlite3.DatabaseError, UnicodeDecodeError):
                    pass
            index.close()
        partial = folder / (INDEX + PARTIAL)
        _remove(partial)
        index = cls(folder, about, partial)
        try:
            index._db.execute("PRAGMA journal_mode = OFF")
            index._fill()
            if index.problems() and not distrust:
                index._keep_names()
            index.seal()
        finally:
            index.close()
        # A journal left by a killed writer belongs to the file that goes away here.
        _remove(folder / INDEX)
        os.replace(partial, folder / INDEX)
        return cls(folder, about, folder / INDEX)

    @classmethod
    def open_sound(cls, folder: Path, about: dict[str, Any], mending: bool = False) -> Index:
        """For the holder of the lock, to rely on: checked whole, and without damaged shards unless
        they are being mended."""
        index = cls.open_for_writing(folder, about)
        try:
            try:
                index.check()
            except IndexDamaged:
                index.close()
                index = cls.open_for_writing(folder, about, distrust=True)
            problems = {} if mending else index.problems()
        except BaseException:
            index.close()
            raise
        if problems:
            index.close()
            raise CacheError("\n".join(problems.values()))
        return index

    @classmethod
    def _existing(cls, folder: Path, about: dict[str, Any]) -> Index | None:
        if not (folder / INDEX).exists():
            return None
        index = None
        try:
            index = cls(folder, about, folder / INDEX)
            if index._ask("SELECT schema, about FROM about") == [(SCHEMA, canonical(about))]:
                return index
        except (IndexDamaged, sqlite3.Error, UnicodeDecodeError):
            pass
        if index:
            index.close()
        return None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Lookups

    def name(self, name: str, plan: str = PLAN) -> Source | None:
        """What is known of a name under a plan, be it a picture's or a failure's."""
        found = self._ask("SELECT * FROM names WHERE name = ? AND plan = ?", name, plan)
        return _source(found[0]) if found else None

    def named(self, name: str) -> list[Source]:
        """What is known of a name under every plan."""
        return [_source(row) for row in self._ask("SELECT * FROM names WHERE name = ?", name)]

    def has(self, sha256: str, plan: str = PLAN) -> bool:
        return bool(self._ask("SELECT 1 FROM pictures WHERE sha256 = ? AND plan = ?", sha256, plan))

    def picture(self, sha256: str, plan: str = PLAN) -> tuple[int, Row] | None:
        """(shard number, row) of a picture."""
        found = self._ask("SELECT * FROM pictures WHERE sha256 = ? AND plan = ?", sha256, plan)
        if not found:
            return None
        sha256, plan, shard, text = sound(found[0])
        grid, size, views = json.loads(text)
        rows = [View(v[0], v[1], v[2], (v[3][0], v[3][1])) for v in views]
        size = (size[0], size[1]) if size else None
        return shard, Row(sha256, plan, (grid[0], grid[1]), size, rows)

    def pictures(self, after: str = "") -> list[str]:
        """The next few thousand pictures' sha256, in order of it."""
        sql = "SELECT DISTINCT sha256 FROM pictures WHERE sha256 > ? ORDER BY 1 LIMIT 4096"
        return [sha256 for (sha256,) in self._ask(sql, after)]

    def names(self, after: str = "") -> list[str]:
        """The next few thousand names, those of failures included, in order."""
        sql = "SELECT DISTINCT name FROM names WHERE name > ? ORDER BY 1 LIMIT 4096"
        return [name for (name,) in self._ask(sql, after)]

    def failures(self) -> list[Source]:
        found = self._ask("SELECT * FROM names WHERE sha256 IS NULL ORDER BY name")
        return [_source(row) for row in found]

    def lost(self) -> list[tuple[int, Source]]:
        """(shard that names it, name) of stored pictures that no sound shard has."""
        sql = (
            "SELECT * FROM names n WHERE sha256 IS NOT NULL AND NOT EXISTS (SELECT 1 FROM pictures "
            "p WHERE p.sha256 = n.sha256 AND p.plan = n.plan) ORDER BY name"
        )
        return [(row[-2], _source(row)) for row in self._ask(sql)]

    def without(self, shards: list[int]) -> list[Source]:
        """Names of stored pictures that are in no shard but these, as they lie there."""
        marks = ", ".join("?" * len(shards))
        sql = (
            "SELECT n.*, p.shard, p.row FROM names n LEFT JOIN pictures p ON p.sha256 = n.sha256 "
            "AND p.plan = n.plan WHERE n.sha256 IS NOT NULL "
            f"AND coalesce(p.shard, n.shard) IN ({marks})"
        )
        found = []
        for *name, shard, row in self._ask(sql, *shards):
            source = _source(tuple(name))
            offset = json.loads(row)[2][0][0] if row else 0
            found.append((-1 if shard is None else shard, offset, source.name, source.plan, source))
        return [source for *_, source in sorted(found, key=lambda one: one[:-1])]

    def problems(self) -> dict[int, str]:
        """Shard number -> what is wrong with it, for the shards that could not be taken in."""
        return {number: row[-1] for number, row in self._stored().items() if row[-1]}

    def totals(self) -> Totals:
        shards = self._stored().values()
        return Totals(
            shards=len(shards),
            pictures=self._ask("SELECT count(DISTINCT sha256) FROM pictures")[0][0],
            tilings=sum(row[4] for row in shards),
            views=sum(row[5] for row in shards),
            bytes=sum(row[2] for row in shards),
            names=self._ask("SELECT count(DISTINCT name) FROM names")[0][0],
            failures=self._ask("SELECT count(*) FROM names WHERE sha256 IS NULL")[0][0],
        )

    def seal(self) -> None:
        """Notes the file's checksum, for `check`. What is added later breaks the seal."""
        with self._lock, trouble():
            seal = checksum(Path(self.path))
            self._db.execute(f"PRAGMA user_version = {seal}")

    def check(self) -> None:
        """Reads all of it: IndexDamaged if any of it cannot be believed."""
        if self._sealed():
            return
        if self._ask("PRAGMA integrity_check") != [("ok",)]:
            raise IndexDamaged
        pictures = sum(row[4] for row in self._stored().values())
        if self._ask("SELECT count(*) FROM pictures") != [(pictures,)]:
            raise IndexDamaged
        with self._lock, trouble():
            for table in ("pictures", "names"):
                for row in self._db.execute(f"SELECT * FROM {table}"):
                    sound(row)

    def _sealed(self) -> bool:
        if self.path == ":memory:":
            return True  # made from the shards by this process
        try:
            return self._ask("PRAGMA user_version") == [(checksum(Path(self.path)),)]
        except OSError:
            return False  # being replaced

    # Following the shards

    def add(self, number: int) -> None:
        """Takes in a finished shard; one that cannot be read is noted with its problem."""
        with self._lock, self._db:
            self._take(number)

    def _fill(self) -> None:
        self._db.executescript(_TABLES)
        with self._db:
            self._db.execute("INSERT INTO about VALUES (?, ?)", (SCHEMA, canonical(self.about)))
            for number in list_shards(self.folder):
                self._take(number)

    def _keep_names(self) -> None:
        """Takes names over from the index before, so that a damaged shard's are known as lost."""
        old = self._existing(self.folder, self.about)
        if old is None:
            return
        try:
            before, after = old._stored(), self._stored()
            with self._lock, self._db:
                for row in old._ask("SELECT * FROM names WHERE sha256 IS NOT NULL"):
                    self._insert("names", sound(row), "IGNORE")
                for number, (*shard, problem) in after.items():
                    was = before.get(number)
                    if problem and was and (was[-1] or KNOWN).endswith(KNOWN):
                        self._insert("shards", (*shard, problem + KNOWN))
        except IndexDamaged:
            pass
        finally:
            old.close()

    def _take(self, number: int) -> None:
        name = shard_name(number)
        path = self.folder / SHARDS / name
        state = path.stat()
        shard = (number, name, state.st_size, state.st_mtime_ns)
        try:
            header = read_header(path)
        except CacheError as error:
            self._insert("shards", (*shard, 0, 0, str(error)))
            return
        different = differences(header.about, self.about, "in the shard", f"in {CACHE_JSON}")
        if different:
            raise CacheError(
                f"shard {path} does not belong to this cache: it differs from {CACHE_JSON} in "
                f"{'; '.join(different)}. Remove the one that is wrong; {CACHE_JSON} is rebuilt "
                "from the shards."
            )
        stored = [row for row in header.rows if self._insert_picture(number, row)]
        for s in header.sources:
            self._insert_name(number, s)
        views = sum(len(row.views) for row in stored)
        self._insert("shards", (*shard, len(stored), views, None))

    def _insert_picture(self, number: int, row: Row) -> bool:
        views = [[v.offset, v.size, v.crc32, list(v.shape)] for v in row.views]
        text = canonical([list(row.grid), list(row.size) if row.size else None, views])
        return self._insert("pictures", (row.sha256, row.plan, number, text), "IGNORE")

    def _insert_name(self, number: int, s: Source) -> None:
        # What failed later, or in another cache that was merged, hides nothing that is there.
        if s.sha256 is None:
            sql = "SELECT 1 FROM names WHERE name = ? AND plan = ? AND sha256 IS NOT NULL"
            if self._db.execute(sql, (s.name, s.plan)).fetchone():
                return
        self._insert("names", (s.name, s.size, s.mtime_ns, s.sha256, s.reason, s.plan, number))

    def _insert(self, table: str, values: tuple[Any, ...], conflict: str = "REPLACE") -> bool:
        marks = ", ".join("?" * (len(values) + 1))
        sql = f"INSERT OR {conflict} INTO {table} VALUES ({marks})"
        return self._db.execute(sql, (*values, crc(values))).rowcount > 0

    def _state(self) -> str:
        """ "current"; "behind" where new shards follow those that are known; else "wrong"."""
        try:
            stored = self._stored()
        except IndexDamaged:
            return "wrong"
        disk = list_shards(self.folder)
        for number, row in stored.items():
            if number not in disk or not self._unchanged(row):
                return "wrong"
        new = set(disk) - set(stored)
        if not new:
            return "current"
        return "behind" if min(new) > max(stored, default=-1) else "wrong"

    def _unchanged(self, row: tuple[Any, ...]) -> bool:
        try:
            state = (self.folder / SHARDS / row[1]).stat()
        except OSError:
            return False
        return (state.st_size, state.st_mtime_ns) == (row[2], row[3])

    def _stored(self) -> dict[int, tuple[Any, ...]]:
        return {row[0]: sound(row) for row in self._ask("SELECT * FROM shards ORDER BY number")}

    def _ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, trouble():
            return self._db.execute(sql, values).fetchall()


def _source(row: tuple[Any, ...]) -> Source:
    """A row of names, which must be sound."""
    return Source(*sound(row)[:-1])


def _remove(path: Path) -> None:
    for name in (path.name, path.name + "-journal"):
        path.with_name(name).unlink(missing_ok=True)
