"""What is in a run's data, and what of it would be left out: found by what training itself does.

Rows go through `gather`, and pictures through `Pictures.get`, as they will; on top of that the
filters say what they would find, and a few rows are rendered.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import TilingConfig
from ..errors import VLMError
from ..images.open import upright_size
from ..images.picture import Picture
from ..images.tiling import look
from .feed import Pictures
from .filters import lengths, screen
from .gather import Found, Gathered, Reading, digest_of, gather
from .mixture import FILTERS, KINDS, Mixture, Source, kind_of, order_of
from .origins import read_bytes
from .samples import Sample
from .sources import read_rows

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

THREADS = 8
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 12


class Tiler:
    """Opens and tiles pictures as an encoder does, without its weights."""

    def __init__(self, tiling: TilingConfig):
        self.tiling = tiling

    def look(self, images: Iterable[Any], max_tiles: int | None = None) -> list[Picture]:
        return [look(image, self.tiling, max_tiles=max_tiles) for image in images]


@dataclass
class Seen:
    """The pictures of all usable rows, each once. sizes: [n, 2] (width, height)."""

    pictures: int = 0
    opened: int = 0
    views: int = 0
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    bad: list[tuple[str, str]] = field(default_factory=list)
    rows: int = 0  # rows that bad pictures cost


@dataclass
class Rendered:
    """A row as the model sees it: (text, whether it is learnt), pictures as `<picture: tokens>`."""

    source: str
    where: str
    spans: list[tuple[str, bool]]


@dataclass
class Report:
    """What `check` found. would_filter: rows that filters which are off would find, by kind."""

    gathered: Gathered
    seen: Seen
    would_filter: dict[str, int]
    rendered: list[Rendered]

    @property
    def clean(self) -> bool:
        return not self.gathered.skipped and not self.seen.bad

    def kinds(self) -> dict[str, int]:
        """Rows of an epoch with one picture, with several, and with text alone."""
        found = Counter(kind_of(sample) for sample in self.gathered.samples)
        return {kind: found[kind] for kind in KINDS}

    def tokens(self) -> dict[str, np.ndarray]:
        """Tokens of each row of an epoch: all, visual ones and supervised ones."""
        samples = self.gathered.samples
        return {
            "tokens": np.array([sample.length for sample in samples], np.int64),
            "visual": np.array([sample.num_visual for sample in samples], np.int64),
            "supervised": np.array([sample.num_supervised for sample in samples], np.int64),
        }


def check(
    sources: Sequence[Source],
    mixture: Mixture,
    pictures: Sequence[Pictures],
    reading: Reading,
    fast: bool = False,
    samples: int = 3,
    progress: Callable[[int, int], None] = lambda done, among: None,
) -> Report:
    """Looks at everything. fast: of pictures only the headers. samples: how many to render."""
    gathered = gather(sources, mixture, pictures, reading)
    seen = look_at(gathered, pictures, fast, progress)
    would = Counter[str]()
    for at, source in enumerate(sources):
        would += _would_filter(source, pictures[at], gathered, at)
    return Report(gathered, seen, dict(would), _render(gathered, reading, samples))


def look_at(
    gathered: Gathered,
    pictures: Sequence[Pictures],
    fast: bool = False,
    progress: Callable[[int, int], None] = lambda done, among: None,
) -> Seen:
    """Opens each picture as training will, in threads; one behind a cache is only looked up."""
    rows: dict[tuple[int, str, int], int] = defaultdict(int)
    for sample in gathered.samples:
        for name in dict.fromkeys(sample.images):
            rows[sample.source, name, len(sample.images)] += 1
    seen, sizes, bad = Seen(len(rows)), [], set()

    def open_one(key: tuple[int, str, int]) -> tuple[int, tuple[int, int] | None] | str:
        source, name, among = key
        shelf = pictures[source]
        try:
            if shelf.cache is not None:
                return shelf.cut(name, among).views, None
            if fast:
                return 0, _header(shelf, name)
            found = shelf.get(name, among)
            return len(found.views), found.size  # type: ignore[union-attr]
        except (VLMError, OSError) as error:
            return str(error)

    keys = iter(rows)
    with ThreadPoolExecutor(THREADS) as pool:
        while stretch := list(islice(keys, 32 * THREADS)):
            for key, found in zip(stretch, pool.map(open_one, stretch), strict=True):
                if isinstance(found, str):
                    bad.add((key[0], key[1]))
                    seen.bad.append((key[1], found))
                    continue
                seen.opened += 1
                seen.views += found[0]
                if found[1] is not None:
                    sizes.append(found[1])
            progress(seen.opened + len(seen.bad), len(rows))
    seen.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    if bad:
        seen.rows = sum(
            any((sample.source, name) in bad for name in sample.images)
            for sample in gathered.samples
        )
    return seen


def spans_of(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A row's text in stretches, and whether each is learnt; `<name: n tokens>` is a picture."""
    tokens, learnt = sample.tokens, sample.supervised
    slot = np.full(len(tokens), -1)
    for number, (start, length) in enumerate(sample.slots):
        # Words between the views of a picture are text.
        visual = tokens[start : start + length] == tokens[start]
        slot[start : start + length][visual] = number
    edges = np.flatnonzero((np.diff(learnt) != 0) | (np.diff(slot) != 0)) + 1
    spans = []
    for piece in np.split(np.arange(len(tokens)), edges):
        if not len(piece):
            continue
        number = int(slot[piece[0]])
        if number >= 0:
            spans.append((f"<{sample.images[number]}: {len(piece)} tokens>", False))
        else:
            text = tokenizer.decode(tokens[piece].tolist(), skip_special=False)
            spans.append((text, bool(learnt[piece[0]])))
    return spans


def histogram(values: np.ndarray, bins: int = BINS) -> list[tuple[int, int, int]]:
    """(from, to, rows), both ends included, in steps of equal width that are round numbers."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // bins))
    scale = 10 ** max(0, len(str(width)) - 1)
    width = next(scale * step for step in (1, 2, 5, 10) if scale * step >= width)
    start = low // width * width
    counts = np.bincount((values - start) // width)
    return [
        (start + at * width, start + (at + 1) * width - 1, int(count))
        for at, count in enumerate(counts)
    ]


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Whole numbers at `QUANTILES`, by their names."""
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES, method="nearest")
    names = ["min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in QUANTILES]
    return dict(zip(names, map(int, found), strict=True))


def _would_filter(source: Source, shelf: Pictures, gathered: Gathered, at: int) -> Counter[str]:
    """What the filters that are off would find among the rows that are used."""
    off = [name for name in FILTERS if name not in source.filters]
    samples = [s for s in gathered.samples if s.source == at and s.time == 1]
    used = {sample.where for sample in samples}
    found = Counter[str]()
    if {"repetition", "duplicates"} & set(off):
        rows = ((where, row) for where, row in read_rows(source.data) if where in used)
        kept = screen(rows, off, partial(digest_of, shelf))
        found.update(row.kind for _, row in kept if isinstance(row, VLMError))
    if "lengths" in off:
        found.update(bad.kind for _, bad in lengths(samples) if bad is not None)
    return found


def _render(gathered: Gathered, reading: Reading, count: int) -> list[Rendered]:
    """A few rows of every source, always the same."""
    found = []
    for at, about in enumerate(gathered.each):
        mine = [s for s in gathered.samples if s.source == at and s.time == 1]
        mine.sort(key=lambda sample: order_of(reading.seed, about.source.name, sample.where))
        for sample in mine[:count]:
            spans = spans_of(sample, reading.tokenizer)
            found.append(Rendered(about.source.name, sample.where, spans))
    return found


def _header(shelf: Pictures, name: str) -> tuple[int, int]:
    origin = shelf.find(name)
    return upright_size(origin if isinstance(origin, str | os.PathLike) else read_bytes(origin)[0])


def describe(report: Report) -> dict[str, Any]:
    """The report as plain JSON."""
    gathered, seen = report.gathered, report.seen
    tokens = report.tokens()
    return {
        "sources": [_about(found) for found in gathered.each],
        "rows": len(gathered.samples),
        "kinds": report.kinds(),
        "left_out": gathered.counts(),
        "skipped": [one._asdict() for one in gathered.skipped],
        "would_filter": report.would_filter,
        "pictures": {
            "named": seen.pictures,
            "opened": seen.opened,
            "views": seen.views,
            "bad": [{"name": name, "reason": reason} for name, reason in seen.bad],
            "rows_lost": seen.rows,
            "width": quantiles(seen.sizes[:, 0]),
            "height": quantiles(seen.sizes[:, 1]),
        },
        "tokens": {name: quantiles(values) for name, values in tokens.items()},
        "totals": {name: int(values.sum()) for name, values in tokens.items()},
        "histogram": histogram(tokens["tokens"]),
        "samples": [
            {"source": one.source, "where": one.where, "spans": one.spans}
            for one in report.rendered
        ],
        "clean": report.clean,
    }


def _about(found: Found) -> dict[str, Any]:
    return {
        "name": found.source.name,
        "data": found.source.data,
        "rows": found.rows,
        "usable": found.usable,
        "used": found.used,
    }
