"""One input in parts, and one picture under two tiling plans."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_cache import Slicer, draw, listed, sha256, shards, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import plan_of, read_header
from mlxvlm.cache.jobs import Named, distinct
from mlxvlm.cache.merge import merge_caches
from mlxvlm.cache.parts import Part
from mlxvlm.cache.prune import prune_cache
from mlxvlm.cache.repair import repair_cache
from mlxvlm.cache.writer import write_cache
from mlxvlm.config import TilingConfig
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

TILES = TilingConfig("dynamic", 32, max_tiles=4)


def tiled(pictures: list[tuple[str, Path]], among: int) -> list[Named]:
    return [Named(name, path, among) for name, path in pictures]


def test_a_picture_under_two_plans(tmp_path):
    """InternVL gives a picture in a row of several fewer tiles."""
    pictures = draw(tmp_path / "pictures", 7, width=90)
    out = tmp_path / "cache"
    encoder = siglip(tiling=TILES)
    rows = [*tiled(pictures, 1), *tiled(pictures[2:5], 2)]
    summary = write_cache(encoder, rows, out, **SIZES)
    assert (summary.total, summary.limited, summary.encoded) == (10, 3, 10)
    assert summary.views == 7 * 5 + 3 * 3  # four tiles or two, and a thumbnail
    assert write_cache(encoder, rows, out).known == 10
    for _ in range(2):
        with EmbeddingCache.open(out) as cache:
            totals = cache.totals()
            assert (len(cache), totals.tilings, totals.names, totals.views) == (7, 10, 7, 44)
            assert list(cache.names()) == [name for name, _ in pictures]
            for i, (name, path) in enumerate(pictures):
                for limit in (None, 2):
                    plan = plan_of(limit)
                    if limit and not 2 <= i < 5:
                        with pytest.raises(CacheError, match="not under the tiling plan 'max-ti"):
                            cache.get(name, plan)
                        continue
                    (want,) = encoder.encode(encoder.look([path.read_bytes()], limit))
                    got = cache.get(name, plan)
                    assert got.grid == want.grid and len(got.views) == (limit or 4) + 1
                    for one, other in zip(want.views, got.views, strict=True):
                        np.testing.assert_allclose(np.array(one), other, atol=1e-5)
                    assert cache.cut(sha256(path), plan).views == len(got.views)
            assert cache.verify() == []
        (out / "index.sqlite").unlink()


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_tiled_input_in_parts_and_in_two_goes(tmp_path, codec):
    pictures = draw(tmp_path / "pictures", 9, width=90)
    pictures[4][1].write_bytes(b"not a picture")
    rows = [*tiled(pictures, 1), *tiled(pictures[1:8], 3)]
    encoder = siglip(tiling=TILES)
    write_cache(encoder, rows, tmp_path / "whole", codec, **SIZES)
    parts = []
    for number in (1, 2):
        earlier, own = Part(number, 2).cut(distinct(rows, TILES), 5)
        parts.append(tmp_path / f"part-{number}")
        write_cache(encoder, own, parts[-1], codec, earlier=earlier, **SIZES)
    joined = [data for part in parts for data in shards(part).values()]
    assert joined == list(shards(tmp_path / "whole").values())
    # A name is done when each of its plans is.
    first = write_cache(encoder, rows[:9], tmp_path / "goes", codec, **SIZES)
    assert (first.encoded, len(first.failures)) == (8, 1)
    second = write_cache(encoder, rows, tmp_path / "goes", codec)
    assert (second.known, second.encoded, len(second.failures)) == (8, 6, 2)
    with EmbeddingCache.open(tmp_path / "goes") as cache:
        names = [name for name, _ in cache.failures()]
        assert names == ["004.png", "004.png (in at most 1 tiles)"]


def test_many_views_end_a_batch(tmp_path):
    class Counted(Slicer):
        tiling = None

        def look(self, images: list[bytes]) -> list[Picture]:
            (picture,) = super().look(images)
            picture.views = picture.views[:1] * 20
            return [picture]

    pictures = draw(tmp_path / "pictures", 7)
    encoder = Counted()
    write_cache(encoder, pictures, tmp_path / "cache", batch_size=8)
    assert encoder.batches == [2, 2, 2, 1]
    path = tmp_path / "cache" / "shards" / "shard-000000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    encoder = Counted()
    done = repair_cache(encoder, tmp_path / "cache", tmp_path / "pictures")
    assert done.pictures == 1 and path.read_bytes() == whole and encoder.batches == [1]


@pytest.mark.parametrize("damage", ["record", "header"])
def test_repair_knows_the_plan(tmp_path, damage):
    pictures = draw(tmp_path / "pictures", 4, width=90)
    encoder = siglip(tiling=TILES)
    out = tmp_path / "cache"
    write_cache(encoder, [*tiled(pictures, 1), *tiled(pictures, 2)], out, batch_size=3)
    whole = shards(out)
    path = out / "shards" / "shard-000000.safetensors"
    data = bytearray(path.read_bytes())
    header = read_header(path)
    data[header.rows[-1].views[1].offset if damage == "record" else 60] ^= 1
    path.write_bytes(data)
    with EmbeddingCache.open(out) as cache:
        problems = cache.verify()
        assert problems and {p.shard for p in problems} == {path.name}
    done = repair_cache(encoder, out, tmp_path / "pictures")
    assert done.left == [] and done.pictures == (1 if damage == "record" else 8)
    if damage == "record":
        assert shards(out) == whole
    with EmbeddingCache.open(out) as cache:
        assert cache.verify() == [] and cache.totals().tilings == 8


def test_prune_keeps_by_picture_and_plan(tmp_path):
    pictures = draw(tmp_path / "pictures", 4, width=90)
    shutil.copy(pictures[0][1], tmp_path / "pictures" / "twin.png")
    twin = ("twin.png", tmp_path / "pictures" / "twin.png")
    encoder = siglip(tiling=TILES)
    out = tmp_path / "cache"
    write_cache(encoder, [*tiled([*pictures, twin], 1), *tiled(pictures[:3], 2)], out, **SIZES)
    with EmbeddingCache.open(out) as cache:
        few = [view.tobytes() for view in cache.get("000.png", plan_of(2)).views]
    done = prune_cache(out, [("twin.png", 2), ("001.png", 1)])
    assert (done.kept, done.dropped) == (2, 5)
    for _ in range(2):
        with EmbeddingCache.open(out) as cache:
            assert [v.tobytes() for v in cache.get("twin.png", plan_of(2)).views] == few
            assert [v.tobytes() for v in cache.get("000.png", plan_of(2)).views] == few
            with pytest.raises(CacheError, match="not under the tiling plan 'default'"):
                cache["000.png"]
            assert len(cache["001.png"].views) == 5 and "002.png" not in cache
            assert cache.verify() == [] and len(cache) == 2
        (out / "index.sqlite").unlink()


# What a part only names


def test_an_unmerged_part_has_lost_nothing(tmp_path):
    pictures = draw(tmp_path / "pictures", 10)
    shutil.copy(pictures[0][1], pictures[8][1])
    for number in (1, 2):
        earlier, own = Part(number, 2).cut(pictures, 5)
        write_cache(Slicer(), own, tmp_path / f"{number}", earlier=distinct(earlier), **SIZES)
    with EmbeddingCache.open(tmp_path / "2") as cache:
        assert cache.verify() == [] and cache.elsewhere() == ["008.png"]
    # Its own damage is still told.
    path = tmp_path / "2" / "shards" / "shard-000000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with EmbeddingCache.open(tmp_path / "2") as cache:
        names = sorted(name for problem in cache.verify() for name in problem.names)
        assert names == ["005.png", "006.png", "007.png", "008.png", "009.png"]
    path.write_bytes(whole)
    merge_caches(tmp_path / "all", [tmp_path / "1", tmp_path / "2"])
    with EmbeddingCache.open(tmp_path / "all") as cache:
        assert cache.verify() == [] and cache.elsewhere() == [] and cache["008.png"].views


def test_parts_merged_into_a_later_one(tmp_path):
    pictures = draw(tmp_path / "pictures", 10)
    shutil.copy(pictures[0][1], pictures[8][1])
    for number in (1, 2):
        earlier, own = Part(number, 2).cut(pictures, 5)
        write_cache(Slicer(), own, tmp_path / f"{number}", earlier=distinct(earlier), **SIZES)
    merge_caches(tmp_path / "2", [tmp_path / "1"])
    assert not (tmp_path / "2" / "part.json").exists()
    with EmbeddingCache.open(tmp_path / "2") as cache:
        assert cache.verify() == [] and cache.elsewhere() == []


# A failure hides nothing


def test_a_failure_in_a_later_cache_hides_no_picture(tmp_path):
    pictures = draw(tmp_path / "pictures", 3)
    write_cache(Slicer(), pictures, tmp_path / "a", **SIZES)
    sound = pictures[1][1].read_bytes()
    pictures[1][1].write_bytes(b"not a picture")
    write_cache(Slicer(), pictures, tmp_path / "b", **SIZES)
    merge_caches(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    for _ in range(2):
        with EmbeddingCache.open(tmp_path / "all") as cache:
            assert cache["001.png"].views and cache.failures() == [] and cache.verify() == []
        (tmp_path / "all" / "index.sqlite").unlink()
    # One that broke since is told at each run, and costs no shard.
    before = shards(tmp_path / "all")
    for _ in range(2):
        summary = write_cache(Slicer(), pictures, tmp_path / "all")
        assert [name for name, _ in summary.failures] == ["001.png"] and summary.known == 2
        assert shards(tmp_path / "all") == before
    pictures[1][1].write_bytes(sound)
    assert write_cache(Slicer(), pictures, tmp_path / "all").failures == []
