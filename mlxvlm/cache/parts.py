"""One input, several machines that share nothing: each takes a part of it into a cache of its own.

A part is a run of whole stretches, so that the parts' shards, one part after the other, are the
shards of a single run. For that a picture must also be in the batch that it is in there: content
that an earlier part has is only named in a later one, as an earlier shard's is. So a job reads and
hashes the pictures before its part, if they are here; where they are not, a picture that two parts
have is encoded in both, and merging keeps the first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..data.origins import read_bytes
from ..durable import write_whole
from ..errors import CacheError, PictureError, UsageError
from .jobs import Job

T = TypeVar("T")

PART_JSON = "part.json"  # in a cache that names pictures which the parts before it have


class Part(NamedTuple):
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """ "2/3" is the second of three."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.count:
            raise UsageError(f"--shard (={text!r}) must be i/n with 1 <= i <= n, such as 2/3.")
        return part

    @classmethod
    def launched(cls) -> Part | None:
        """This process's part among those that mlx.launch started; None where it did not."""
        from ..machine.ranks import launched_group

        group = launched_group()
        return cls(group.rank() + 1, group.size()) if group else None

    def folder(self, out: Path) -> Path:
        """Where a launched process writes: several may run on one machine."""
        return out.with_name(f"{out.name}.{self.number}-of-{self.count}")

    def cut(self, jobs: list[T], stretch: int) -> tuple[list[T], list[T]]:
        """(jobs of earlier parts, jobs of this one); every part but the last is whole stretches."""
        stretches = -(-len(jobs) // stretch)
        start, stop = (
            stretch * (stretches * i // self.count) for i in (self.number - 1, self.number)
        )
        if start == stop:
            raise CacheError(
                f"part {self.number} of {self.count} is empty: {len(jobs):,} pictures make "
                f"{stretches:,} shards of {stretch:,}. Use fewer parts."
            )
        return jobs[:start], jobs[start:stop]


def mark_part(folder: Path, earlier: int) -> None:
    """Notes that a cache is a part, with so many jobs in the parts before it."""
    if not is_part(folder):
        write_whole(folder / PART_JSON, (json.dumps({"earlier": earlier}) + "\n").encode())


def is_part(folder: Path) -> bool:
    """Whether pictures that a cache only names may be in the parts before it."""
    return (folder / PART_JSON).exists()


def contents(jobs: Iterable[Job], workers: int) -> set[tuple[str, str]]:
    """(sha256, plan) of each picture that is here."""
    found: set[tuple[str, str]] = set()
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="mlxvlm-hash") as pool:
        rest = iter(jobs)
        while some := list(islice(rest, 4096)):
            digests = zip(pool.map(_digest, some), some, strict=True)
            found |= {(sha256, job.plan) for sha256, job in digests if sha256}
    return found


def _digest(job: Job) -> str | None:
    try:
        return hashlib.sha256(read_bytes(job.origin)[0]).hexdigest()
    except (OSError, PictureError):
        return None
