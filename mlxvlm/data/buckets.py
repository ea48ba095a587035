"""Samples to batches: right-padded rows of like length, in an order that a seed fixes.

Right padding under causal attention is never seen, so no mask array is needed and Metal's fused
attention serves training too. Padded lengths are multiples of `length_multiple`, so shapes are few.

With `share_prefix`, rows of one picture whose tokens agree up to its end become one group:

    prefix   [G, P]      the shared tokens of each group
    tokens   [G * R, L]  the rest of each row, R rows a group

and without it P is 0 and R is 1. `predict`, `targets` index the positions of the flattened prefix
followed by the flattened tokens. `packing` makes the same kind of batch of lines of several rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..attention import SHORT_QUERIES
from ..images.picture import Cut
from .samples import Sample

# A predicted position count is padded to a multiple of this, for the same reason.
PREDICT_MULTIPLE = 64


@dataclass
class TargetBatch:
    """positions [S] into the flattened hidden states; words [S, K] and masses [S, K] (0: none)."""

    positions: np.ndarray
    words: np.ndarray
    masses: np.ndarray


@dataclass
class Batch:
    """One micro-batch. labels [S] follow the positions in `predict` [S]; weights [S] are
    `label_weight` of their rows, 0 for padding.

    cuts: of each of the `images`. segments: for packed lines, int32 like `tokens`: which positions
    of a line are of one row.
    """

    prefix: np.ndarray | None
    tokens: np.ndarray
    images: list[str]
    cuts: list[Cut]
    predict: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    targets: dict[str, TargetBatch] = field(default_factory=dict)
    num_tokens: int = 0
    rows: int = 0
    segments: np.ndarray | None = None

    @property
    def supervised_tokens(self) -> int:
        return int(np.count_nonzero(self.weights))

    @property
    def total_weight(self) -> float:
        """What this micro-batch adds to what its step's loss is divided by."""
        return float(self.weights.sum(dtype=np.float64))


@dataclass
class Group:
    """Rows that share their first `prefix` tokens and their pictures."""

    rows: list[Sample]
    prefix: int

    @property
    def length(self) -> int:
        return max(row.length for row in self.rows) - self.prefix

    @property
    def num_tokens(self) -> int:
        return self.prefix + sum(row.length - self.prefix for row in self.rows)


def group(samples: Sequence[Sample], share_prefix: int) -> list[Group]:
    """Groups of up to `share_prefix` consecutive rows of one picture; single rows where it is 0."""
    if not share_prefix:
        return [Group([sample], 0) for sample in samples]
    groups: list[Group] = []
    for sample in samples:
        last = groups[-1] if groups else None
        if (
            last is not None
            and sample.prefix
            and len(last.rows) < share_prefix
            and last.prefix == sample.prefix
            and last.rows[0].source == sample.source
            and last.rows[0].images == sample.images
            and np.array_equal(last.rows[0].tokens[: last.prefix], sample.tokens[: last.prefix])
        ):
            last.rows.append(sample)
        else:
            groups.append(Group([sample], sample.prefix))
    return groups


def epoch(
    groups: Sequence[Group],
    batch_size: int,
    length_multiple: int,
    seed: int,
    number: int,
    by_modality: bool = False,
) -> list[list[int]]:
    """Batches (lists of group indices) of one epoch: a pure function of its arguments.

    Groups of like shape meet: shuffled, cut into stretches of 64 batches, sorted by length within
    each, dealt into batches, and the batches shuffled again. by_modality: groups with pictures and
    without never meet, as LLaVA's `group_by_modality_length` has it (Liu et al. 2023).
    """
    rng = np.random.default_rng([seed, number])
    shapes: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    lengths = [-(-one.length // length_multiple) for one in groups]
    for index in rng.permutation(len(groups)).tolist():
        rows = groups[index].rows
        pictures = by_modality and bool(rows[0].images)
        shapes[(groups[index].prefix, len(rows), pictures)].append(index)
    batches: list[list[int]] = []
    stretch = 64 * batch_size
    for key in sorted(shapes):
        members = shapes[key]
        for start in range(0, len(members), stretch):
            near = sorted(members[start : start + stretch], key=lengths.__getitem__)
            batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def label_weight(count: int, loss: str) -> float:
    """Weight of each of a row's `count` supervised tokens, as InternVL 2.5 has it.

    loss: "token" 1, so that long answers weigh more; "sample" 1 / count, every row alike; "square"
    1 / sqrt(count), between the two.
    """
    return {"token": 1.0, "sample": 1 / max(1, count), "square": 1 / math.sqrt(max(1, count))}[loss]


def padded(longest: int, length_multiple: int) -> int:
    """The length of a batch whose longest row has so many tokens."""
    # Rows of at most 8 positions meet the trap that `attention` describes, in mlx-lm's layers too.
    return -(-max(SHORT_QUERIES + 1, longest) // length_multiple) * length_multiple


def collate(groups: Sequence[Group], length_multiple: int, loss: str = "token") -> Batch:
    """One batch of groups that agree in prefix length."""
    P = groups[0].prefix
    R = max(len(g.rows) for g in groups)
    L = padded(max(g.length for g in groups), length_multiple)
    prefix = np.stack([g.rows[0].tokens[:P] for g in groups]) if P else None
    tokens = np.zeros((len(groups) * R, L), dtype=np.int32)
    marks = Marks(loss)
    for i, g in enumerate(groups):
        for j, row in enumerate(g.rows):
            line = i * R + j
            start = len(groups) * P + line * L
            whole = row.tokens
            tokens[line, : len(whole) - P] = whole[P:]

            def place(at: np.ndarray, i: int = i, start: int = start) -> np.ndarray:
                return np.where(at < P, i * P + at, start + at - P)

            marks.add(row, whole, place)
    return marks.batch(
        prefix=prefix,
        tokens=tokens,
        images=[name for g in groups for name in g.rows[0].images],
        cuts=[cut for g in groups for cut in g.rows[0].cuts],
        num_tokens=sum(g.num_tokens for g in groups),
        rows=sum(len(g.rows) for g in groups),
    )


class Marks:
    """What the rows of a batch predict and where, gathered row by row; loss: as `label_weight`."""

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.predict: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.found: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)

    def add(
        self, row: Sample, tokens: np.ndarray, place: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """place: positions in the row to positions in the flattened batch; tokens: the row's."""
        # Position p predicts token p + 1.
        where = np.flatnonzero(row.supervised[1:])
        self.predict.append(place(where).astype(np.int32))
        self.labels.append(tokens[where + 1].astype(np.int32))
        self.weights.append(np.full(len(where), label_weight(len(where), self.loss), np.float32))
        for name, targets in row.targets.items():
            self.found[name] += [
                (int(place(np.array(t.position))), t.words, t.masses) for t in targets
            ]

    def batch(self, **rest: Any) -> Batch:
        flat, marks = np.concatenate(self.predict), np.concatenate(self.labels)
        size = -(-len(flat) // PREDICT_MULTIPLE) * PREDICT_MULTIPLE
        return Batch(
            predict=np.pad(flat, (0, size - len(flat))),
            labels=np.pad(marks, (0, size - len(marks))),
            weights=np.pad(np.concatenate(self.weights), (0, size - len(flat))),
            targets={name: _stack(entries) for name, entries in self.found.items()},
            **rest,
        )


def _stack(entries: list[tuple[int, np.ndarray, np.ndarray]]) -> TargetBatch:
    size = -(-len(entries) // PREDICT_MULTIPLE) * PREDICT_MULTIPLE
    width = max(len(words) for _, words, _ in entries)
    positions = np.zeros(size, dtype=np.int32)
    ids = np.zeros((size, width), dtype=np.int32)
    masses = np.zeros((size, width), dtype=np.float32)
    for i, (position, words, share) in enumerate(entries):
        positions[i] = position
        ids[i, : len(words)] = words
        masses[i, : len(words)] = share
    return TargetBatch(positions, ids, masses)
