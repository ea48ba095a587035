"""Which rows share a line: what fits, how full, in an order that seed and epoch fix."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxvlm.data.batching import BUCKETS_PADDING, Batching, Plan
from mlxvlm.data.buckets import group
from mlxvlm.data.feed import Feed
from mlxvlm.data.packing import collate_lines, fit_lines, stream_lines
from mlxvlm.data.samples import Sample
from mlxvlm.errors import ConfigError
from mlxvlm.images.picture import Cut

IMAGE = 261


def test_internvl_golden_trace():
    """At most 6 tiles and 1,000 tokens a line, 2 lines open."""
    rows = "A400/3 B300/2 C500/4 D200/1 E600/3 F100/5 G350/1 H250/2 I700/6 J300/1".split()
    tokens = [int(row[1:].split("/")[0]) for row in rows]
    tiles = [int(row.split("/")[1]) for row in rows]
    lines = stream_lines(range(10), tokens, tiles, 1000, 6, open_lines=2)
    found = ["".join(rows[i][0] for i in line) for line in lines]
    assert found == ["ABD", "F", "I", "CG", "EH", "J"]


@pytest.mark.parametrize("pack", [fit_lines, stream_lines])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 6)), max_size=60),
    st.integers(6, 12),
)
def test_every_row_is_in_one_line_and_every_line_is_within_its_limits(pack, rows, views):
    lengths, tiles = [n for n, _ in rows], [v for _, v in rows]
    lines = pack(range(len(rows)), lengths, tiles, 50, views)
    assert sorted(i for line in lines for i in line) == list(range(len(rows)))
    assert all(line for line in lines)
    assert all(sum(lengths[i] for i in line) <= 50 for line in lines)
    assert all(sum(tiles[i] for i in line) <= views for line in lines)
    if pack is fit_lines:
        # First-fit: no row of a later line had room in an earlier one when it came, so no two lines
        # could be one.
        whole = sorted(
            (sum(lengths[i] for i in line), sum(tiles[i] for i in line)) for line in lines
        )
        for a in range(len(whole)):
            for b in range(a):
                fits = whole[a][0] + whole[b][0] <= 50 and whole[a][1] + whole[b][1] <= views
                assert not fits


def test_lines_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = (196 + rng.integers(10, 400, 20_000)).tolist()
    for pack, most in ((fit_lines, 0.025), (stream_lines, 0.06)):
        lines = pack(range(20_000), lengths, [1] * 20_000, 2048, 48)
        assert 1 - sum(lengths) / (2048 * len(lines)) < most


def make_rows(count: int, spread: tuple[int, int] = (10, 400), text_only: float = 0.0):
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        pictured = rng.random() >= text_only
        words = rng.integers(3, 200, int(rng.integers(*spread)))
        head = [IMAGE] * 16 if pictured else []
        tokens = np.concatenate([head, words]).astype(np.int32)
        learnt = np.zeros(len(tokens), bool)
        learnt[-3:] = True
        slots, cuts = ([(0, 16)], [Cut(1)]) if pictured else ([], [])
        rows.append(Sample(tokens, learnt, [f"{number}.png"] * pictured, slots=slots, cuts=cuts))
    return rows


def plan(rows, **want) -> Plan:
    settings = {"batch_size": 4} | want
    return Plan(group(rows, 0), Batching(**settings))


@pytest.mark.parametrize("kind", ["auto", "pack", "internvl"])
def test_lines_with_room_for_no_row_leave_whole_buckets(kind):
    rows = make_rows(40)
    found = plan(rows, kind=kind, pack_length=12)
    assert found.decision.kind == "buckets" and "have room for no row" in found.decision.why
    assert found.epoch(1) == plan(rows, kind="buckets").epoch(1)


@pytest.mark.parametrize("kind", ["buckets", "pack", "internvl"])
@pytest.mark.parametrize("by_modality", [False, True])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(kind, by_modality):
    rows = make_rows(500, text_only=0.3)
    found = plan(rows, kind=kind, pack_length=384, by_modality=by_modality)
    orders = []
    for number in (0, 1, 2, 1, 0):
        made = found.epoch(number)
        seen = [i for batch in made for line in batch.lines for i in line]
        assert sorted(seen) == list(range(500))
        orders.append(made)
    assert orders[0] == orders[4] and orders[1] == orders[3] and orders[0] != orders[1]
    again = plan(rows, kind=kind, pack_length=384, by_modality=by_modality)
    assert again.epoch(2) == orders[2]
    other = plan(rows, kind=kind, pack_length=384, by_modality=by_modality, seed=1)
    assert other.epoch(0) != orders[0]
    mixed = [{bool(rows[i].images) for line in b.lines for i in line} for b in orders[0]]
    assert any(len(one) == 2 for one in mixed) != by_modality


def test_rows_that_fit_no_line_travel_in_buckets():
    rows = make_rows(200)
    found = plan(rows, kind="pack", pack_length=256, pack_views=2)
    for batch in found.epoch(0):
        lengths = [[rows[i].length for i in line] for line in batch.lines]
        if batch.length:
            assert batch.length == 256 and len(lengths) <= 4
            assert all(sum(line) <= 256 and len(line) <= 2 for line in lengths)
        else:
            assert all(len(line) == 1 and line[0] > 256 for line in lengths)
            assert len(lengths) * max(n for (n,) in lengths) <= 4 * 256


def test_shapes_are_few():
    """A compiled step, and an allocator's cache, keep something for every shape that they meet."""
    rows = make_rows(3000, text_only=0.2)
    for kind, most in (("buckets", 2 * 416 // 32), ("pack", 2), ("internvl", 2)):
        feed = Feed(rows, Nothing(), Batching(4, kind, pack_length=512))
        shapes = Counter(feed.fetch(micro)[0].tokens.shape for micro in feed.plan.epoch(0))
        assert len(shapes) <= most, shapes


class Nothing:
    """Pictures that are never looked at."""

    def of(self, row: Sample, time: tuple[int, int] | None = None) -> list[None]:
        return [None for _ in row.images]


def test_auto_packs_where_buckets_would_be_padded():
    even, spread = make_rows(600), make_rows(600, (1, 30), text_only=0.5)
    assert plan(even, kind="auto").decision.kind == "buckets"
    asked = []
    found = plan(spread, kind="auto", batch_size=8, packable=lambda: asked.append(1) or 2048)
    decision = found.decision
    assert asked and decision.kind == "pack"
    assert decision.padding < BUCKETS_PADDING < decision.buckets_padding
    # A step keeps its size, whatever is decided.
    assert 4 < decision.rows < 12
    buckets = plan(spread, kind="buckets", batch_size=8).decision
    assert buckets.buckets_padding == buckets.padding == decision.buckets_padding
    held = sum(row.length for row in spread)
    whole = sum(len(b.lines) * (b.length or 0) for b in found.epoch(0))
    assert decision.padding == pytest.approx(1 - held / whole)

    def refuse() -> int:
        raise ConfigError("no packs here.")

    # In a narrow decoder the scores of long lines would cost more than the padding.
    narrow = plan(spread, kind="auto", batch_size=8, width=4).decision
    assert narrow.kind == "buckets" and "cost" in narrow.why
    refused = plan(spread, kind="auto", packable=refuse).decision
    assert refused.kind == "buckets" and refused.why == "no packs here."
    with pytest.raises(ConfigError, match="no packs"):
        plan(spread, kind="pack", packable=refuse)


def test_a_long_pack_is_never_made():
    rows = make_rows(400)
    assert plan(rows, kind="pack", pack_length=5000, packable=lambda: 2048).decision.length == 2048
    assert plan(rows, kind="pack", packable=lambda: 2048).decision.length <= 1024
    assert plan(rows, kind="pack", packable=lambda: 300).decision.length == 300


def test_batches_go_on_where_a_run_stopped():
    """Also in later epochs, which need not have as many micro-batches."""
    rows = make_rows(300)
    for kind in ("buckets", "pack", "internvl"):
        feed = Feed(rows, Nothing(), Batching(3, kind, pack_length=448))
        first, second = (len(feed.plan.epoch(n)) for n in range(2))
        order = feed.order(0)
        whole = [next(order) for _ in range(first + second + 5)]
        for start in (0, 3, first - 1, first, first + 2, first + second):
            other = Feed(rows, Nothing(), feed.batching).order(start)
            assert [next(other) for _ in range(5)] == whole[start : start + 5]
        assert feed.batches(2) == first + second
        assert feed.batches(1.5) == first + second / 2


def test_a_line_is_its_rows_one_after_the_other():
    rows = make_rows(4, (5, 9))
    batch = collate_lines([rows[:3], rows[3:]], 96)
    tokens = batch.tokens[0]
    assert batch.tokens.shape == batch.segments.shape == (2, 96)
    ends = np.cumsum([0] + [row.length for row in rows[:3]])
    for number, row in enumerate(rows[:3]):
        assert np.array_equal(tokens[ends[number] : ends[number + 1]], row.tokens)
        assert set(batch.segments[0, ends[number] : ends[number + 1]]) == {number}
    assert set(batch.segments[0, ends[3] :]) == {3} and set(batch.segments[1]) == {0, 1}
    flat = batch.tokens.reshape(-1)
    real = batch.weights > 0
    assert np.array_equal(flat[batch.predict[real] + 1], batch.labels[real])
    assert batch.images == [name for row in rows for name in row.images]
    assert (batch.rows, batch.supervised_tokens) == (4, 12)


def test_packing_a_large_set_takes_seconds():
    rng = np.random.default_rng(0)
    count = 100_000
    lengths, views = (196 + rng.integers(10, 400, count)).tolist(), [1] * count
    order = rng.permutation(count).tolist()
    for pack in (fit_lines, stream_lines):
        started = time.process_time()
        for start in range(0, count, 4096):
            pack(order[start : start + 4096], lengths, views, 2048, 48)
        assert time.process_time() - started < 5, pack


@pytest.mark.parametrize("kind", ["buckets", "pack", "internvl"])
def test_batches_are_counted_as_they_are_made(kind):
    rows = make_rows(300, text_only=0.3)
    want = Batching(4, kind, pack_length=512, by_modality=True)
    made = Plan(group(rows, 0), want)
    counted = Plan(group(rows, 0), want)
    assert [counted.num_batches(n) for n in range(4)] == [len(made.epoch(n)) for n in range(4)]
