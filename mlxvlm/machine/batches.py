"""How large a run's batches are, told from the rows' lengths without making the batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..data.batching import MicroBatch
from ..data.feed import Feed
from ..data.samples import Sample
from ..images.picture import Cut


def num_positions(feed: Feed, micro: MicroBatch) -> int:
    """Tokens of a micro-batch, padding included."""
    return feed.plan.rows.measure(micro, feed.batching.length_multiple)[0]


def num_supervised(feed: Feed, micro: MicroBatch) -> int:
    """Tokens of a micro-batch that are learnt."""
    return sum(row.num_supervised for i in micro.numbers for row in feed.groups[i].rows)


def num_views(feed: Feed, micro: MicroBatch) -> int:
    """Views of all pictures of a micro-batch."""
    return sum(feed.plan.rows.views[number] for number in micro.numbers)


def heaviest(feed: Feed) -> list[MicroBatch]:
    """The micro-batches of an epoch that may need most: the one with most tokens, the one with most
    views, and of those that have nearly as many tokens the one with most to learn."""
    batches = feed.plan.epoch(0)
    sizes = [num_positions(feed, micro) for micro in batches]
    most = max(sizes)
    near = [b for b, size in zip(batches, sizes, strict=True) if size > 0.8 * most]
    # Rows that learn most are mostly the longest: looking at a few hundred is enough.
    near = sorted(near, key=lambda b: num_positions(feed, b), reverse=True)[:256]
    learnt = max(near, key=lambda b: num_supervised(feed, b))
    seen = max(batches, key=lambda b: num_views(feed, b))
    found = [near[0]]
    if num_supervised(feed, learnt) > num_supervised(feed, near[0]):
        found.append(learnt)
    if num_views(feed, seen) > max(num_views(feed, micro) for micro in found):
        found.append(seen)
    return found


def with_fewer_visual(sample: Sample, visual: Callable[[Cut], int]) -> Sample:
    """A row as it is where a picture that is cut so gives fewer visual tokens."""
    tokens, supervised = sample.tokens, sample.supervised
    keep = np.ones(len(tokens), np.bool_)
    slots, gone = [], 0
    for (start, length), cut in zip(sample.slots, sample.cuts, strict=True):
        places = start + np.flatnonzero(tokens[start : start + length] == tokens[start])
        fewer = places[visual(cut) :]
        keep[fewer] = False
        slots.append((start - gone, length - len(fewer)))
        gone += len(fewer)
    prefix = int(keep[: sample.prefix].sum())
    return Sample(
        tokens[keep],
        supervised[keep],
        sample.images,
        prefix,
        slots=slots,
        source=sample.source,
        where=sample.where,
        cuts=sample.cuts,
    )
