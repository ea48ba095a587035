"""One input in parts, and one picture under two tiling plans."""

from __future__ import annotations

import os
import shutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_cache import Slicer, draw, listed, sha256, shards, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import plan_of
from mlxvlm.cache.parts import Part
from mlxvlm.cache.writer import write_cache
from mlxvlm.data.batching import Batching
from mlxvlm.data.feed import Feed, Pictures
from mlxvlm.data.records import parse_record
from mlxvlm.data.samples import prepare
from mlxvlm.errors import CacheError, ConfigError
from mlxvlm.images.picture import Picture

SIZES: dict[str, Any] = {"batch_size": 3, "shard_pictures": 5}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def test_what_names_a_part():
    assert Part.parse("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="must be i/n"):
            Part.parse(wrong)
    assert Part.launched() is None


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_are_whole_stretches_and_all_of_the_input(count):
    jobs = list(range(23))
    found = []
    for number in range(1, count + 1):
        earlier, own = Part(number, count).cut(jobs, 5)
        assert earlier == found and len(earlier) % 5 == 0 and own
        found += own
    assert found == jobs
    with pytest.raises(CacheError, match="part 1 of 6 is empty: 23 pictures make 5 shards"):
        Part(1, 6).cut(jobs, 5)


@pytest.mark.parametrize(
    ("make", "codec"), [(Slicer, "float32"), (siglip, "float32"), (siglip, "int8")]
)
def test_the_parts_shards_are_a_single_runs(tmp_path, make, codec):
    draw(tmp_path / "pictures", 13)
    # Content that a later part has too, and what no part can read.
    for name, of in (("0075.png", "001.png"), ("0115.png", "003.png"), ("0116.png", "009.png")):
        shutil.copy(tmp_path / "pictures" / of, tmp_path / "pictures" / name)
    for name in ("002.png", "0117.png"):
        (tmp_path / "pictures" / name).write_bytes(b"not a picture")
    pictures = listed(tmp_path / "pictures")
    write_cache(make(), pictures, tmp_path / "whole", codec, **SIZES)
    joined: list[bytes] = []
    for number in (1, 2, 3):
        out = tmp_path / f"part-{number}"
        earlier, own = Part(number, 3).cut(pictures, 5)
        write_cache(make(), own, out, codec, earlier=earlier, **SIZES)
        again = write_cache(make(), own, out, codec, earlier=earlier)
        assert (again.encoded, again.shards) == (0, 0)  # what lies elsewhere is not missed
        joined += shards(out).values()
    assert joined == list(shards(tmp_path / "whole").values())


def test_a_part_without_the_other_parts_pictures(tmp_path):
    pictures = draw(tmp_path / "pictures", 10)
    shutil.copy(pictures[0][1], pictures[8][1])
    pictures[0][1].unlink()
    summary = write_cache(Slicer(), pictures[5:], tmp_path / "part", earlier=pictures[:5], **SIZES)
    assert (summary.total, summary.encoded) == (5, 5)


# Tiling plans


class Tiles(Slicer):
    """A stand-in for a tiling: a picture is 4 tiles and itself, or as few as its row allows."""

    def look(self, images: list[bytes], max_tiles: int | None = None) -> list[Picture]:
        pictures = super().look(images)
        for picture in pictures:
            tiles = min(4, max_tiles or 4)
            view = picture.views[0]
            picture.views = [np.roll(view, i, axis=1) for i in range(tiles + 1)]
            picture.grid = (1, tiles)
        return pictures


def tiles_each(among: int) -> int | None:
    return None if among == 1 else max(1, 4 // among)


def test_a_picture_under_two_plans(tmp_path):
    pictures = draw(tmp_path / "pictures", 7)
    out = tmp_path / "cache"
    write_cache(Tiles(), pictures, out, **SIZES)
    before = shards(out)
    summary = write_cache(Tiles(), pictures[2:5], out, max_tiles=2)
    assert (summary.known, summary.encoded, summary.views) == (0, 3, 9)
    after = shards(out)
    assert {name: after[name] for name in before} == before
    assert write_cache(Tiles(), pictures[2:5], out, max_tiles=2).known == 3
    assert write_cache(Tiles(), pictures, out).known == 7
    for _ in range(2):
        with EmbeddingCache.open(out) as cache:
            for i, (name, path) in enumerate(pictures):
                for limit in (None, 2):
                    plan = plan_of(limit)
                    if limit and not 2 <= i < 5:
                        with pytest.raises(CacheError, match="not under the tiling plan 'max-ti"):
                            cache.get(name, plan)
                        continue
                    look = Tiles().look([path.read_bytes()], limit)
                    for want, got in zip(
                        Tiles().encode(look)[0].views, cache.get(name, plan).views, strict=True
                    ):
                        np.testing.assert_array_equal(np.array(want), got)
                    assert cache.num_views(sha256(path), plan) == (limit or 4) + 1
            assert cache.verify() == []
        (out / "index.sqlite").unlink()


def test_one_picture_in_rows_of_one_and_of_three_trains(tmp_path):
    """InternVL gives a picture in a row of several fewer tiles."""
    from tiny_vlm import tiny_vlm

    from mlxvlm.train.losses import batch_loss, count

    vlm = tiny_vlm()
    width = vlm.config.vision.hidden_size
    tokens = vlm.config.vision.num_tokens

    class Wide(Tiles):
        """Its views are as the projector takes them."""

        def _view(self, view: np.ndarray, sha256: str | None) -> mx.array:
            return mx.array(np.resize(view.astype(np.float32) / 255, (tokens, width)))

    pictures = draw(tmp_path / "pictures", 3)
    names = [name for name, _ in pictures]
    raw: list[dict[str, Any]] = [
        {"image": names[0], "text": "one"},
        {
            "images": names,
            "messages": [
                {"role": "user", "content": "which?"},
                {"role": "assistant", "content": "the first"},
            ],
        },
    ]
    records = [(f"row {i}", parse_record(row, f"row {i}")) for i, row in enumerate(raw)]
    write_cache(Wide(), pictures, tmp_path / "cache")
    write_cache(Wide(), pictures, tmp_path / "cache", max_tiles=tiles_each(3))
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        source = Pictures(None, tmp_path, cache, tiles_each)
        samples, skipped = prepare(
            records, vlm.tokenizer, vlm.config, source.count_views, max_seq_length=4096
        )
        assert skipped == []
        feed = Feed(samples, source, Batching(1))
        views = []
        step = nn.value_and_grad(vlm, batch_loss)
        for batch, found in feed.once():
            assert batch is not None
            features = source.views(found)
            views.append((len(batch.images), features.shape[0]))
            (loss, _), _ = step(vlm, batch, features, {}, count([batch]))
            assert np.isfinite(loss.item())
        assert not feed.failed and sorted(views) == [(1, 5), (3, 6)]
