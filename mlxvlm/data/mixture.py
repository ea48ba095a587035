"""A run's sources, and how many rows of each an epoch has.

    [[sources]]                          [mixture]
    data = "chats.json"                  alpha = {science = 0.1, math = 0.5, code = 0.2}
    repeat = 2                           ratio = {single = 0.8, multi = 0.1, text = 0.1}

An epoch takes every row of a source `repeat` times. Where sources have a `weight`, the epoch stays
as long as all rows together, and is shared by weight. Then, as MM1.5 balances its data, categories
are brought to 1 : alpha beside "general", and rows of one picture, of several, and of text alone to
`ratio`, in which the rows of one picture all stay.

A source that is taken 2.3 times gives all its rows twice and a fixed three tenths a third time.
Which ones is a function of the seed, the source's name and the row's place in it: the same for
every epoch, more of a source always include what fewer would, and another source changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .response_formats import FORMATS

if TYPE_CHECKING:
    from .samples import Sample

GENERAL = "general"
KINDS: tuple[str, ...] = ("single", "multi", "text")
AUGMENTATIONS = ("jpeg",)
FILTERS = ("repetition", "lengths", "duplicates")
NONE = "none"


@dataclass
class Source:
    """One set of rows, and what is its own. An empty text means what the run says, and "none" none.

    name: what reports call it, and what its draws depend on; by default its file's or folder's.
    images, cache, augment, response_format, filter: as the run's options of the same names.
    repeat: how often an epoch has each row; may be broken. weight: its share of the epoch instead.
    fraction, cap: only such a share of the rows, at most so many, drawn by the seed before anything
        is left out. category: for `Mixture.alpha`. max_tiles: the most tiles of a row's pictures
        together, within what the model's tiling allows; 0 means that alone.
    """

    data: str = ""
    name: str = ""
    images: str = ""
    cache: str = ""
    repeat: float = 1.0
    weight: float = 0.0
    fraction: float = 1.0
    cap: int = 0
    max_tiles: int = 0
    category: str = GENERAL
    augment: str = ""
    response_format: str = ""
    filter: str = ""

    def check(self) -> None:
        """UsageError, where a value cannot be meant."""
        if not self.data:
            raise UsageError("a source needs 'data'.")
        where = f"source {self.name or self.data}"
        if not self.repeat > 0:
            raise UsageError(f"{where}: repeat (={self.repeat}) must be above 0.")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"{where}: fraction (={self.fraction}) must be above 0, up to 1.")
        for name in ("weight", "cap", "max_tiles"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{where}: {name} (={getattr(self, name)}) must be at least 0.")
        if self.weight and self.repeat != 1:
            raise UsageError(f"{where} has a weight and a repeat; one is said by the other.")
        for name, known in (("augment", AUGMENTATIONS), ("response_format", tuple(FORMATS))):
            value = getattr(self, name)
            if value and value not in (*known, NONE):
                raise UsageError(
                    f"{where}: {name} (={value!r}) must be {', '.join(known)} or {NONE}."
                )
        for one in self.filters:
            if one not in FILTERS:
                raise UsageError(f"{where}: filter {one!r} must be in {', '.join(FILTERS)}.")
        if self.augment not in ("", NONE) and self.cache not in ("", NONE):
            raise UsageError(
                f"{where}: augment (={self.augment!r}) changes pictures, and a cache has their "
                "features already: leave out one of the two."
            )

    @property
    def filters(self) -> list[str]:
        names = [name.strip() for name in self.filter.split(",")]
        return [name for name in names if name and name != NONE]


@dataclass
class Mixture:
    """MM1.5's ratios: alpha by category beside "general"; ratio of single, multi and text rows."""

    alpha: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)

    def check(self, sources: Sequence[Source]) -> None:
        """UsageError, where the ratios cannot be meant with these sources."""
        for name in ("alpha", "ratio"):
            if not isinstance(getattr(self, name), dict):
                raise UsageError(f"mixture.{name} must be a table of names and numbers.")
        weighted = [source for source in sources if source.weight]
        if weighted and len(weighted) < len(sources):
            one = next(source for source in sources if not source.weight)
            raise UsageError(f"source {one.name} has no weight, but others have: give all one.")
        if weighted and self.alpha:
            raise UsageError("weights and mixture.alpha both say how many rows; choose one.")
        categories = {source.category for source in sources}
        for name in self.alpha:
            if name == GENERAL or name not in categories:
                raise UsageError(
                    f"mixture.alpha names {name!r}; the sources' categories beside {GENERAL!r} are "
                    f"{', '.join(sorted(categories - {GENERAL})) or 'none'}."
                )
        if self.alpha and GENERAL not in categories:
            raise UsageError(f"mixture.alpha is beside {GENERAL!r}, and no source is of that.")
        for name in self.ratio:
            if name not in KINDS:
                raise UsageError(f"mixture.ratio names {name!r}; it has {', '.join(KINDS)}.")
        if self.ratio and not _positive(self.ratio.get("single")):
            raise UsageError("mixture.ratio needs a share of single above 0.")
        for table in (self.alpha, self.ratio):
            for name, value in table.items():
                if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                    raise UsageError(f"mixture: {name} (={value!r}) must be a number from 0 up.")


def complete(sources: Sequence[Source], defaults: dict[str, Any]) -> list[Source]:
    """Sources with names, each its own, and with what the run says where they say nothing."""
    found: list[Source] = []
    taken: Counter[str] = Counter()
    for source in sources:
        known = {entry.name for entry in fields(source)} & set(defaults)
        values = {name: getattr(source, name) or defaults[name] for name in known}
        name = source.name or Path(source.data).stem or Path(source.data).resolve().name
        taken[name] += 1
        if taken[name] > 1:
            if source.name:
                raise UsageError(f"two sources are named {name!r}.")
            name = f"{name}-{taken[name]}"
        for key in values:
            values[key] = "" if values[key] == NONE else values[key]
        found.append(replace(source, **values, name=name))
        found[-1].check()
    return found


def order_of(seed: int, source: str, where: str) -> int:
    """Rows drawn are those with the lowest of these."""
    text = f"{seed}\n{source}\n{where}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def drawn(source: Source, seed: int, places: Callable[[], Sequence[str]]) -> set[str] | None:
    """Which rows `fraction` and `cap` leave, by their places; None: all. places: of all rows."""
    if source.fraction == 1 and not source.cap:
        return None
    wheres = places()
    count = round(source.fraction * len(wheres))
    count = min(count, source.cap) if source.cap else count
    ranked = sorted(wheres, key=lambda where: order_of(seed, source.name, where))
    return set(ranked[: max(count, 1)])


def mix(
    each: Sequence[list[Sample]], sources: Sequence[Source], mixture: Mixture, seed: int
) -> list[Sample]:
    """The rows of an epoch, source by source, each in its own order."""
    counts = [Counter(kind_of(sample) for sample in samples) for samples in each]
    times = _times(counts, sources, mixture)
    out: list[Sample] = []
    for samples, source, factors in zip(each, sources, times, strict=True):
        out += _repeated(samples, source, factors, seed)
    return out


def kind_of(sample: Sample) -> str:
    return KINDS[0] if len(sample.images) == 1 else KINDS[1] if sample.images else KINDS[2]


def _times(
    counts: Sequence[Counter[str]], sources: Sequence[Source], mixture: Mixture
) -> list[dict[str, float]]:
    """How often each kind of row of each source is taken."""
    sizes = [sum(count.values()) for count in counts]
    times = [source.repeat for source in sources]
    if any(source.weight for source in sources):
        whole = sum(source.weight for source, size in zip(sources, sizes, strict=True) if size)
        times = [
            sum(sizes) * source.weight / whole / max(size, 1)
            for source, size in zip(sources, sizes, strict=True)
        ]
    held: dict[str, float] = defaultdict(float)
    for source, size, time in zip(sources, sizes, times, strict=True):
        held[source.category] += size * time
    for at, source in enumerate(sources):
        if source.category in mixture.alpha and held[source.category]:
            wanted = mixture.alpha[source.category] * held[GENERAL]
            times[at] *= wanted / held[source.category]
    factors = [dict.fromkeys(KINDS, time) for time in times]
    if mixture.ratio:
        rows = {
            kind: sum(count[kind] * f[kind] for count, f in zip(counts, factors, strict=True))
            for kind in KINDS
        }
        if not rows["single"]:
            raise UsageError("mixture.ratio is beside rows of one picture, and there are none.")
        for kind in KINDS[1:]:
            share = mixture.ratio.get(kind, 0.0)
            if share and not rows[kind]:
                raise UsageError(
                    f"mixture.ratio wants a share of {share:g} of {kind} rows; there are none."
                )
            wanted = rows["single"] * share / mixture.ratio["single"]
            for f in factors:
                f[kind] *= wanted / rows[kind] if rows[kind] else 0.0
    return factors


def _repeated(
    samples: list[Sample], source: Source, factors: dict[str, float], seed: int
) -> list[Sample]:
    if all(factors[kind] == 1 for kind in KINDS):
        return samples
    ranked: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for at, sample in enumerate(samples):
        ranked[kind_of(sample)].append(at)
    times = [0] * len(samples)
    for kind, members in ranked.items():
        if not members:
            continue
        members.sort(key=lambda at: order_of(seed, source.name, samples[at].where))
        whole, rest = divmod(round(factors[kind] * len(members)), len(members))
        for rank, at in enumerate(members):
            times[at] = whole + (rank < rest)
    # Pass after pass, so that rows of one picture stay neighbours.
    return [
        sample if number == 1 else sample.again(number)
        for number in range(1, max(times, default=0) + 1)
        for sample, time in zip(samples, times, strict=True)
        if number <= time
    ]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
