"""Rows of unlike length into lines of one length, so that little of a batch is padding.

    a a a a a b b b c c .        tokens and views (tiles) of a line are both limited;
    d d d d d d d e e e e        a row that exceeds either travels in a bucket instead

Two ways to choose which rows share a line, each a pure function of the order that it is given:

fit_lines         first-fit, longest rows first, trying the fullest lines first: the least padding
stream_lines      InternVL 2.5's: rows in their order, into a few open lines (Chen et al. 2024)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from .buckets import Batch, Marks
from .samples import Sample

# Lines that InternVL 2.5's recipes keep open (max_buffer_size).
OPEN_LINES = 20


def fit_lines(
    rows: Sequence[int], lengths: Sequence[int], views: Sequence[int], tokens: int, most_views: int
) -> list[list[int]]:
    """Lines of at most `tokens` tokens and `most_views` views, each a list of `rows`.

    lengths, views: of every row, by its number. Costs about a microsecond a row.
    """
    lines: list[list[int]] = []
    seen: list[int] = []
    # Lines by the tokens that they have room for; bit r of `some` says that by_room[r] has any.
    by_room: list[list[int]] = [[] for _ in range(tokens + 1)]
    some = 0
    for row in sorted(rows, key=lengths.__getitem__, reverse=True):
        need, new = lengths[row], views[row]
        rest = some >> need << need
        line, room = -1, tokens
        while rest and line < 0:
            fullest = (rest & -rest).bit_length() - 1
            for at, candidate in enumerate(by_room[fullest]):
                if seen[candidate] + new <= most_views:
                    line, room = candidate, fullest
                    del by_room[fullest][at]
                    some ^= 0 if by_room[fullest] else 1 << fullest
                    break
            rest &= rest - 1
        if line < 0:
            line = len(lines)
            lines.append([])
            seen.append(0)
        lines[line].append(row)
        seen[line] += new
        by_room[room - need].append(line)
        some |= 1 << (room - need)
    return lines


def stream_lines(
    rows: Sequence[int],
    lengths: Sequence[int],
    views: Sequence[int],
    tokens: int,
    most_views: int,
    open_lines: int = OPEN_LINES,
) -> list[list[int]]:
    """Lines as InternVL 2.5 packs them (dataset_packed.py, without overflow), in its order.

    Open lines stand with most views first. A row goes into the first with room for it. A line with
    no room left for a token or a view is done; so is the one with most views, when more than
    `open_lines` are open; and in the end all that are.
    """
    done: list[list[int]] = []
    waiting: list[tuple[int, int, list[int]]] = []  # views, tokens, rows
    for row in rows:
        have, length, line = views[row], lengths[row], [row]
        for at, (v, t, found) in enumerate(waiting):
            if v + have <= most_views and t + length <= tokens:
                have, length, line = v + have, t + length, [*found, row]
                del waiting[at]
                break
        if length == tokens or have == most_views:
            done.append(line)
            continue
        # Behind those with as many views.
        waiting.insert(bisect_right(waiting, -have, key=lambda one: -one[0]), (have, length, line))
        if len(waiting) > open_lines:
            done.append(waiting.pop(0)[2])
    return done + [line for *_, line in waiting]


def collate_lines(lines: Sequence[Sequence[Sample]], length: int, loss: str = "token") -> Batch:
    """One batch of packed lines, [lines, length]; what no row fills is a segment of its own."""
    tokens = np.zeros((len(lines), length), dtype=np.int32)
    segments = np.zeros((len(lines), length), dtype=np.int32)
    marks = Marks(loss)
    for i, rows in enumerate(lines):
        end = 0
        for number, row in enumerate(rows):
            whole, start = row.tokens, end
            end += len(whole)
            tokens[i, start:end] = whole
            segments[i, start:end] = number
            shift = i * length + start
            marks.add(row, whole, lambda at, shift=shift: at + shift)
        segments[i, end:] = len(rows)
    return marks.batch(
        prefix=None,
        tokens=tokens,
        images=[name for rows in lines for row in rows for name in row.images],
        cuts=[cut for rows in lines for row in rows for cut in row.cuts],
        num_tokens=sum(row.length for rows in lines for row in rows),
        rows=sum(len(rows) for rows in lines),
        segments=segments,
    )
