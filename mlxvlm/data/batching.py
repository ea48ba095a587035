"""Buckets or packs: how the rows of a run become micro-batches.

    buckets    rows of like length, right-padded; plain causal attention
    pack       lines of several rows under a mask, filled as well as can be
    internvl   the same, filled as InternVL 2.5 fills them
    auto       buckets, unless more than a tenth of their tokens would be padding, and packs would
               cost less

Buckets are preferred because attention without an array mask is the fast one, and a line of L
tokens costs L x L scores a head. By operations, a position of a line costs 1 + L / 6D, where a
decoder of width D has 12 D² weights a block; a line is as long as makes that least. The order is a
pure function of rows, settings, seed and epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ..attention import SHORT_QUERIES
from ..errors import ConfigError
from ..language.packed import PACK_LIMIT
from .buckets import Group, epoch, padded
from .packing import fit_lines, stream_lines

# The padding that `auto` puts up with in buckets.
BUCKETS_PADDING = 0.10
# Rows that are fitted into lines together; the next ones start new lines.
STRETCH = 4096
# Chosen line lengths are multiples of this, and judged by so many rows.
LINE_MULTIPLE, ROWS_JUDGED = 128, 20_000


@dataclass
class Batching:
    """How rows are asked to meet.

    batch_size: rows a micro-batch (pictures, where rows share a prefix); lines, where `kind` is
    "pack" or "internvl". pack_length: tokens of a line at most, 0 to choose. pack_views: views of a
    line at most, 0 for any number. by_modality: rows with pictures and rows without never meet.
    width: of the language model. packable: gives the longest line that it takes, or raises a
    ConfigError.
    """

    batch_size: int
    kind: str = "buckets"
    length_multiple: int = 32
    pack_length: int = 0
    pack_views: int = 0
    by_modality: bool = False
    seed: int = 0
    width: int = 4096
    packable: Callable[[], int] = lambda: PACK_LIMIT


@dataclass(frozen=True)
class MicroBatch:
    """Numbers of groups, line by line. length: of packed lines; 0 for a bucket of single rows."""

    lines: list[list[int]]
    length: int = 0

    @property
    def numbers(self) -> list[int]:
        return [number for line in self.lines for number in line]


@dataclass
class Decision:
    """What was decided: shares of positions that are padding, and the reason where one is needed.

    lines, length: of packs, a micro-batch; 0 for buckets. rows: a micro-batch, on average.
    """

    kind: str
    padding: float
    buckets_padding: float
    lines: int = 0
    length: int = 0
    rows: float = 0.0
    why: str = ""


class Rows:
    """The rows of a run as numbers: what batching needs to know of them."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.lengths = [one.length for one in groups]
        self.views = [one.rows[0].num_views for one in groups]

    def weigh(self, batches: Sequence[MicroBatch], want: Batching) -> tuple[float, float]:
        """The share of positions that no row fills, and what all of them cost."""
        filled = whole = cost = 0.0
        for batch in batches:
            filled += sum(self.groups[number].num_tokens for number in batch.numbers)
            positions, length = self.measure(batch, want.length_multiple)
            whole += positions
            cost += _cost(positions, length, want.width)
        return 1 - filled / whole, cost

    def measure(self, batch: MicroBatch, length_multiple: int) -> tuple[int, int]:
        """Positions of a micro-batch, padding included, and those of one line."""
        if batch.length:
            return len(batch.lines) * batch.length, batch.length
        groups = [self.groups[number] for number in batch.numbers]
        prefix, rows = groups[0].prefix, max(len(one.rows) for one in groups)
        longest = padded(max(one.length for one in groups), length_multiple)
        return len(groups) * (prefix + rows * longest), prefix + longest


def _cost(positions: int, length: int, width: int) -> float:
    return positions * (1 + length / (6 * width))


class Plan:
    """The micro-batches of any epoch, once `decision` says how rows meet."""

    def __init__(self, groups: Sequence[Group], want: Batching):
        self.rows, self.want = Rows(groups), want
        self._epoch: Callable[[int], list[MicroBatch]] = partial(_buckets, self.rows, want)
        self._made: tuple[int, list[MicroBatch]] = (0, self._epoch(0))
        share, cost = self.rows.weigh(self._made[1], want)
        self.decision = Decision("buckets", share, share)
        if want.kind != "buckets":
            self._consider_packs(any(one.prefix for one in groups), cost)
        made = self.epoch(0)
        self.decision.rows = sum(len(one.rows) for one in groups) / len(made)

    def epoch(self, number: int) -> list[MicroBatch]:
        """The micro-batches of one epoch, in order."""
        if self._made[0] != number:
            self._made = (number, self._epoch(number))
        return self._made[1]

    def num_batches(self, number: int) -> int:
        """How many micro-batches an epoch has. Buckets are as many in each, so that none is made to
        count them; packs need not be."""
        return len(self._made[1] if self.decision.kind == "buckets" else self.epoch(number))

    def describe(self) -> dict[str, Any]:
        return asdict(self.decision)

    def _consider_packs(self, shares_prefix: bool, cost: float) -> None:
        want, rows, share = self.want, self.rows, self.decision.padding
        auto = want.kind == "auto"
        if auto and (shares_prefix or share <= BUCKETS_PADDING):
            return
        try:
            longest = want.packable()
        except ConfigError as error:
            if not auto:
                raise
            self.decision.why = str(error)
            return
        kind = "pack" if auto else want.kind
        mean = float(np.mean(rows.lengths))
        # In `auto` a micro-batch keeps its size: packing is to change the padding, not the step.
        budget = want.batch_size * mean if auto else longest
        length = _line_length(rows, want, kind, longest, budget)
        if want.pack_length and min(rows.lengths) > length:
            shortest = f"the shortest has {min(rows.lengths)} tokens"
            self.decision.why = f"lines of {length} have room for no row: {shortest}."
            return
        lines = max(1, round(budget / length)) if auto else want.batch_size
        packs = partial(_packs, rows, want, kind, lines, length)
        made = packs(0)
        packed, dearer = rows.weigh(made, want)
        if auto and dearer >= cost:
            self.decision.why = (
                f"packs of {length} tokens would have {packed:.1%}, and cost {dearer / cost:.2f}x."
            )
            return
        self._epoch, self._made = packs, (0, made)
        self.decision = Decision(kind, packed, share, lines, length)


def _buckets(
    rows: Rows,
    want: Batching,
    number: int,
    only: Sequence[int] | None = None,
    size: int | None = None,
) -> list[MicroBatch]:
    numbers = range(len(rows.groups)) if only is None else only
    groups = [rows.groups[i] for i in numbers]
    size = size or want.batch_size
    batches = epoch(groups, size, want.length_multiple, want.seed, number, want.by_modality)
    return [MicroBatch([[numbers[i]] for i in batch]) for batch in batches]


def _packs(
    rows: Rows, want: Batching, kind: str, lines: int, length: int, number: int
) -> list[MicroBatch]:
    rng = np.random.default_rng([want.seed, number])
    most = _most_views(rows, want)
    fitting: dict[bool, list[int]] = {False: [], True: []}
    alone: list[int] = []
    for row in rng.permutation(len(rows.groups)).tolist():
        if rows.lengths[row] > length or rows.views[row] > most:
            alone.append(row)
        else:
            fitting[want.by_modality and bool(rows.groups[row].rows[0].images)].append(row)
    found: list[MicroBatch] = []
    for some in fitting.values():
        made = _lines(rows, kind, some, length, most)
        made = [made[i] for i in rng.permutation(len(made))]
        found += [MicroBatch(made[i : i + lines], length) for i in range(0, len(made), lines)]
    # A bucket of rows that fit no line has about as many tokens as a micro-batch of packs.
    longest = max((rows.lengths[row] for row in alone), default=1)
    found += _buckets(rows, want, number, sorted(alone), max(1, lines * length // longest))
    return [found[i] for i in rng.permutation(len(found))]


def _lines(rows: Rows, kind: str, some: list[int], length: int, most: int) -> list[list[int]]:
    if kind == "internvl":
        return stream_lines(some, rows.lengths, rows.views, length, most)
    found: list[list[int]] = []
    for start in range(0, len(some), STRETCH):
        near = some[start : start + STRETCH]
        found += fit_lines(near, rows.lengths, rows.views, length, most)
    return found


def _line_length(rows: Rows, want: Batching, kind: str, longest: int, budget: float) -> int:
    """Tokens of a line: as asked for, or what costs least for the tokens that it holds."""
    least = SHORT_QUERIES + 1
    if want.pack_length:
        return max(least, min(want.pack_length, longest))
    most = _most_views(rows, want)
    judged = list(range(0, len(rows.lengths), -(-len(rows.lengths) // ROWS_JUDGED)))
    # One row in twenty may be too long for a line and travel alone.
    usual = int(np.quantile([rows.lengths[row] for row in judged], 0.95, method="higher"))
    start, end = (-(-int(n) // LINE_MULTIPLE) * LINE_MULTIPLE for n in (usual, budget))
    best = (float("inf"), min(start, longest))
    for length in range(start, min(max(start, end), longest) + 1, LINE_MULTIPLE):
        some = [r for r in judged if rows.lengths[r] <= length and rows.views[r] <= most]
        lines = _lines(rows, kind, some, length, most)
        held = sum(rows.lengths[r] for r in some)
        best = min(best, (_cost(len(lines) * length, length, want.width) / max(1, held), length))
    return best[1]


def _most_views(rows: Rows, want: Batching) -> int:
    return want.pack_views or max(rows.views, default=0) * len(rows.views)
