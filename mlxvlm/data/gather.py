"""From a run's sources to its samples: what training and `mlxvlm data check` both go through.

rows -> drawn -> response format -> filters -> samples -> lengths -> mixture
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ModelConfig, TilingConfig
from ..errors import DataError, PictureError, UsageError, VLMError
from ..images.tiling import tiles_each
from .augment import AUGMENTATIONS
from .feed import Pictures, Several
from .filters import lengths, screen
from .mixture import NONE, Mixture, Source, drawn, mix
from .origins import read_bytes
from .records import Record
from .response_formats import ask_for
from .samples import Sample, Skipped, prepare
from .sources import finder, picture_root, read_records, read_rows
from .urls import fetch_all

if TYPE_CHECKING:
    from ..cache import EmbeddingCache
    from ..language.tokenizer import Tokenizer
    from ..vision.encoder import Encoder

# Rows whose addresses are fetched together.
TOGETHER = 256

Rows = Iterator[tuple[str, Record | VLMError]]


@dataclass
class Reading:
    """How rows become samples: the same for every source of a run."""

    tokenizer: Tokenizer
    config: ModelConfig
    max_seq_length: int
    targets: Sequence[str] = ()
    seed: int = 0
    allow_urls: bool = False


@dataclass
class Found:
    """What one source gave. rows: of its file; usable: of those drawn; used: of an epoch."""

    source: Source
    rows: int = 0
    usable: int = 0
    used: int = 0
    skipped: list[Skipped] = field(default_factory=list)


@dataclass
class Gathered:
    """samples: an epoch's, in no order yet. pictures: theirs. each: what each source gave."""

    samples: list[Sample]
    pictures: Pictures
    each: list[Found]

    @property
    def skipped(self) -> list[Skipped]:
        """Of all sources; of several, with the source's name before the place."""
        if len(self.each) == 1:
            return self.each[0].skipped
        return [
            one._replace(where=f"{found.source.name}: {one.where}")
            for found in self.each
            for one in found.skipped
        ]

    def examples(self) -> list[Skipped]:
        """`skipped`, but the first of every kind before the second of any."""
        met: Counter[str] = Counter()
        ranked = []
        for one in self.skipped:
            met[one.kind] += 1
            ranked.append((met[one.kind], one))
        return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]

    def counts(self) -> dict[str, int]:
        """How many rows were left out, by the kind of what is wrong, the most frequent first."""
        return dict(Counter(one.kind for one in self.skipped).most_common())


def gather(
    sources: Sequence[Source], mixture: Mixture, pictures: Sequence[Pictures], reading: Reading
) -> Gathered:
    """Samples of all usable rows. pictures: one for each source."""
    mixture.check(sources)
    found, each = [], []
    for at, (source, shelf) in enumerate(zip(sources, pictures, strict=True)):
        samples, about = read_source(source, shelf, reading, at)
        each.append(samples)
        found.append(about)
    samples = mix(each, sources, mixture, reading.seed)
    used = Counter(sample.source for sample in samples)
    for at, about in enumerate(found):
        about.used = used[at]
    whole = pictures[0] if len(pictures) == 1 else Several(pictures[0].encoder, pictures)
    return Gathered(samples, whole, found)


def read_source(
    source: Source, pictures: Pictures, reading: Reading, number: int = 0
) -> tuple[list[Sample], Found]:
    """Every usable row of a source once, and what was left out."""
    about = Found(source)
    rows = _drawn(source, reading, about)
    if reading.allow_urls and pictures.cache is None:
        rows = _fetched(rows)
    if source.response_format not in ("", NONE):
        rows = _asked(rows, source.response_format)
    if source.filters:
        rows = screen(rows, source.filters, partial(digest_of, pictures))
    samples, about.skipped = prepare(
        rows,
        reading.tokenizer,
        reading.config,
        pictures.cut,
        reading.max_seq_length,
        tuple(reading.targets),
        number,
    )
    if "lengths" in source.filters:
        judged = list(lengths(samples))
        samples = [sample for sample, bad in judged if bad is None]
        about.skipped += [bad for _, bad in judged if bad is not None]
    about.usable = len(samples)
    return samples, about


def shelf_of(
    source: Source,
    encoder: Encoder | None,
    cache: EmbeddingCache | None,
    tiling: TilingConfig,
    allow_urls: bool = False,
    pixels: bool = False,
) -> Pictures:
    """The pictures of one source. pixels: as in `Pictures`."""
    root = picture_root(source.data, source.images)
    outside = Path(source.images) if source.images else root
    if cache is None and not outside.is_dir():
        raise UsageError(f"--images must name a folder, and {outside} is none.")
    return Pictures(
        encoder,
        root,
        cache,
        partial(tiles_each, tiling, most=source.max_tiles),
        finder(source.data, source.images, allow_urls),
        AUGMENTATIONS.get(source.augment),
        pixels,
    )


def write_skipped(
    path: Path, read: Iterable[tuple[Gathered, Mapping[tuple[int, str], str]]]
) -> None:
    """A line of JSON for each row that was left out: source, data, where, reason, kind.

    read: what was gathered, and of it what `Feed.lost` names: rows whose pictures turned out to be
    unreadable.
    """
    rows = []
    for gathered, lost in read:
        rows += [(found.source, one) for found in gathered.each for one in found.skipped]
        for (number, where), reason in lost.items():
            one = Skipped(where, reason, PictureError.default_kind)
            rows.append((gathered.each[number].source, one))
    with path.open("w", encoding="utf-8") as file:
        for source, one in rows:
            about = {"source": source.name, "data": source.data}
            file.write(json.dumps(about | one._asdict(), ensure_ascii=False) + "\n")


def _drawn(source: Source, reading: Reading, about: Found) -> Rows:
    chosen = drawn(source, reading.seed, lambda: [w for w, _ in read_records(source.data)])
    for where, row in read_rows(source.data):
        about.rows += 1
        if chosen is None or where in chosen:
            yield where, row


def _asked(rows: Rows, name: str) -> Rows:
    for where, row in rows:
        if isinstance(row, Record):
            row = replace(row, messages=ask_for(row.messages, name))
        yield where, row


def _fetched(rows: Rows) -> Rows:
    """The rows, once their addresses were fetched; one that fails shows in `prepare`."""
    while stretch := list(islice(rows, TOGETHER)):
        fetch_all(name for _, row in stretch if isinstance(row, Record) for name in row.images)
        yield from stretch


def digest_of(pictures: Pictures, name: str) -> str:
    """sha256 of a picture's content."""
    if pictures.cache is not None:
        return pictures.cache.sha256_of(name)
    try:
        return hashlib.sha256(read_bytes(pictures.find(name))[0]).hexdigest()
    except OSError as error:
        raise DataError(f"picture {name}: {error.strerror}.", kind="picture") from None
