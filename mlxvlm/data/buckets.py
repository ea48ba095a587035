"""Samples to batches: right-padded rows of like length, in an order that a seed fixes.

Right padding under causal attention is never seen, so no mask array is needed and Metal's fused
attention serves training too. Padded lengths are multiples of `length_multiple`, so shapes are few.

With `share_prefix`, rows of one picture whose tokens agree up to its end become one group:

    prefix   [G, P]      the shared tokens of each group
    tokens   [G * R, L]  the rest of each row, R rows a group

and without it P is 0 and R is 1. `predict`, `targets` index the positions of the flattened prefix
followed by the flattened tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..attention import SHORT_QUERIES
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
    `label_weight` of their rows, 0 for padding."""

    prefix: np.ndarray | None
    tokens: np.ndarray
    images: list[str]
    predict: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    targets: dict[str, TargetBatch] = field(default_factory=dict)
    num_tokens: int = 0
    rows: int = 0

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
            and last.rows[0].images == sample.images
            and np.array_equal(last.rows[0].tokens[: last.prefix], sample.tokens[: last.prefix])
        ):
            last.rows.append(sample)
        else:
            groups.append(Group([sample], sample.prefix))
    return groups


def epoch(
    groups: Sequence[Group], batch_size: int, length_multiple: int, seed: int, number: int
) -> list[list[int]]:
    """Batches (lists of group indices) of one epoch: a pure function of its arguments.

    Groups of like shape meet: shuffled, cut into stretches of 64 batches, sorted by length within
    each, dealt into batches, and the batches shuffled again.
    """
    rng = np.random.default_rng([seed, number])
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in rng.permutation(len(groups)):
        shapes[(groups[index].prefix, len(groups[index].rows))].append(int(index))
    batches: list[list[int]] = []
    stretch = 64 * batch_size
    for key in sorted(shapes):
        members = shapes[key]
        for start in range(0, len(members), stretch):
            near = sorted(
                members[start : start + stretch],
                key=lambda i: -(-groups[i].length // length_multiple),
            )
            batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def label_weight(count: int, loss: str) -> float:
    """Weight of each of a row's `count` supervised tokens, as InternVL 2.5 has it.

    loss: "token" 1, so that long answers weigh more; "sample" 1 / count, every row alike; "square"
    1 / sqrt(count), between the two.
    """
    return {"token": 1.0, "sample": 1 / max(1, count), "square": 1 / math.sqrt(max(1, count))}[loss]


def collate(groups: Sequence[Group], length_multiple: int, loss: str = "token") -> Batch:
    """One batch of groups that agree in prefix length."""
    P = groups[0].prefix
    R = max(len(g.rows) for g in groups)
    # Rows of at most 8 positions meet the trap that `attention` describes, in mlx-lm's layers too.
    longest = max(SHORT_QUERIES + 1, *(g.length for g in groups))
    L = -(-longest // length_multiple) * length_multiple
    prefix = np.stack([g.rows[0].tokens[:P] for g in groups]) if P else None
    tokens = np.zeros((len(groups) * R, L), dtype=np.int32)
    predict: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    found: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
    for i, g in enumerate(groups):
        for j, row in enumerate(g.rows):
            line = i * R + j
            start = len(groups) * P + line * L

            def place(position: int, i: int = i, start: int = start) -> int:
                return i * P + position if position < P else start + position - P

            whole = row.tokens
            tokens[line, : len(whole) - P] = whole[P:]
            # Position p predicts token p + 1.
            where = np.flatnonzero(row.supervised[1:])
            predict.append(np.array([place(int(p)) for p in where], dtype=np.int32))
            labels.append(whole[where + 1].astype(np.int32))
            weights.append(np.full(len(where), label_weight(len(where), loss), np.float32))
            for name, targets in row.targets.items():
                found[name] += [(place(t.position), t.words, t.masses) for t in targets]
    flat, marks = np.concatenate(predict), np.concatenate(labels)
    size = -(-len(flat) // PREDICT_MULTIPLE) * PREDICT_MULTIPLE
    return Batch(
        prefix=prefix,
        tokens=tokens,
        images=[name for g in groups for name in g.rows[0].images],
        predict=np.pad(flat, (0, size - len(flat))),
        labels=np.pad(marks, (0, size - len(marks))),
        weights=np.pad(np.concatenate(weights), (0, size - len(flat))),
        targets={name: _stack(entries) for name, entries in found.items()},
        num_tokens=sum(r.length - P for g in groups for r in g.rows) + P * len(groups),
        rows=sum(len(g.rows) for g in groups),
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
