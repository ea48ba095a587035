"""A plan says what a run writes, to within one percent, before it writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_cache import Slicer, draw, shards, siglip

from mlxvlm.cache.codecs import CODECS
from mlxvlm.cache.jobs import distinct
from mlxvlm.cache.plan import Plan, make_plan
from mlxvlm.cache.writer import write_cache
from mlxvlm.errors import CacheError

SIZES: dict[str, Any] = {"batch_size": 4, "shard_pictures": 9}


class Wide(Slicer):
    """Features as large against their headers as real ones are, or nearly."""

    def _view(self, view: np.ndarray, sha256: str | None) -> mx.array:
        return mx.tile(super()._view(view, sha256), (1, 40))


def written(folder: Path) -> int:
    return sum(len(data) for data in shards(folder).values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("pool", ["none", "mean2"])
def test_bytes_of_one_view_a_picture(tmp_path, codec, pool):
    encoder = siglip(pool=pool)
    jobs = distinct(draw(tmp_path / "pictures", 30))
    plan = make_plan(siglip(), jobs, tmp_path / "cache", codec, **SIZES)
    assert not (tmp_path / "cache").exists()
    write_cache(encoder, jobs, tmp_path / "cache", codec, **SIZES)
    found = {(o.codec, o.pool): o.bytes for o in plan.options}
    assert abs(found[codec, pool] / written(tmp_path / "cache") - 1) < 0.01
    assert (plan.pictures, plan.views, plan.spread) == (30, 30, 0)
    assert plan.bytes == found[codec, "none"] and len(found) == 2 * len(CODECS)


@pytest.mark.parametrize("batches", [0, 3])
def test_bytes_of_views_that_differ(tmp_path, batches):
    jobs = distinct(draw(tmp_path / "pictures", 40))
    plan = make_plan(Wide(), jobs, tmp_path / "cache", "float32", batches=batches, **SIZES)
    summary = write_cache(Wide(), jobs, tmp_path / "cache", **SIZES)
    assert plan.views == summary.views and plan.spread == 0  # all were looked at
    assert abs(plan.bytes / written(tmp_path / "cache") - 1) < 0.01
    assert (plan.seconds is not None) == (batches > 1)


def test_a_sample_says_how_far_it_may_be_off(tmp_path, monkeypatch):
    monkeypatch.setattr("mlxvlm.cache.plan.MOST_LOOKED_AT", 50)
    jobs = distinct(draw(tmp_path / "pictures", 151))
    plan = make_plan(Wide(), jobs, tmp_path / "cache", "float32", **SIZES)
    summary = write_cache(Wide(), jobs, tmp_path / "cache", **SIZES)
    assert plan.sampled == 50 and 0.02 < plan.spread < 0.2
    assert abs(plan.views / summary.views - 1) < 2 * plan.spread


def test_what_is_done_is_not_planned_again(tmp_path):
    pictures = draw(tmp_path / "pictures", 20)
    pictures[3][1].write_bytes(b"no picture")
    write_cache(siglip(), pictures[:12], tmp_path / "cache", **SIZES)
    before = shards(tmp_path / "cache")
    plan = make_plan(siglip(), distinct(pictures), tmp_path / "cache", "float32")
    assert (plan.pictures, plan.known) == (8, 11) and shards(tmp_path / "cache") == before
    write_cache(siglip(), pictures, tmp_path / "cache")
    assert (
        abs(plan.bytes / (written(tmp_path / "cache") - sum(map(len, before.values()))) - 1) < 0.01
    )
    with pytest.raises(CacheError, match="encoder.pool"):
        make_plan(siglip(pool="mean2"), distinct(pictures), tmp_path / "cache", "float32")


def test_bad_pictures_are_counted(tmp_path):
    pictures = draw(tmp_path / "pictures", 12)
    for _, path in pictures[::2]:
        path.write_bytes(b"")
    plan = make_plan(siglip(), distinct(pictures), tmp_path / "cache", "bf16", **SIZES)
    assert (plan.sampled, plan.unreadable) == (12, 6)


def test_a_large_plan_is_refused_with_what_is_smaller():
    plan = Plan(9, 0, 0, 9, 100, 0.0, 199, "bf16", "none")
    with pytest.raises(CacheError, match="--yes to go ahead, or name another disk\\.$"):
        plan.refuse_if_too_large(Path("x"))
    plan.free = 200
    plan.refuse_if_too_large(Path("x"))
