"""repair, merge and prune: nothing sound is lost, nothing is encoded without need."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_cache import Slicer, draw, listed, sha256, shards, siglip

from mlxvlm import durable
from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import read_header
from mlxvlm.cache.lock import WriterLock
from mlxvlm.cache.merge import merge_caches
from mlxvlm.cache.parts import Part
from mlxvlm.cache.prune import prune_cache
from mlxvlm.cache.repair import repair_cache
from mlxvlm.cache.writer import write_cache
from mlxvlm.errors import CacheError

SIZES: dict[str, Any] = {"batch_size": 3, "shard_pictures": 5}
Named = list[tuple[str, Path]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def pictures(tmp_path: Path) -> Named:
    return draw(tmp_path / "pictures", 13)


@pytest.fixture
def made(tmp_path: Path, pictures: Named) -> Path:
    write_cache(Slicer(), pictures, tmp_path / "cache", **SIZES)
    return tmp_path / "cache"


def shard(folder: Path, number: int) -> Path:
    return folder / "shards" / f"shard-{number:06}.safetensors"


def flip(path: Path, place: int) -> None:
    """Flips a bit as a bad disk does: neither size nor time tell."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def contents(folder: Path) -> dict[str, list[bytes]]:
    """What each name reads as."""
    with EmbeddingCache.open(folder) as cache:
        failed = dict(cache.failures())
        return {
            name: [view.tobytes() for view in cache[name].views]
            for name in cache.names()
            if name not in failed
        }


def alone(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names of rows of one picture."""
    return [(name, 1) for name in names]


def sound(folder: Path) -> bool:
    with EmbeddingCache.open(folder) as cache:
        return cache.verify() == [] and not (folder / "writer.lock").exists()


# Repair


@pytest.mark.parametrize("codec", ["float32", "bf16", "int8"])
def test_records_are_mended_to_the_same_bytes(tmp_path, pictures, codec):
    encoder = siglip()
    folder = tmp_path / "cache"
    write_cache(encoder, pictures, folder, codec, **SIZES)
    whole = shards(folder)
    for number, row in ((0, 1), (0, 4), (2, 0)):
        view = read_header(shard(folder, number)).rows[row].views[0]
        flip(shard(folder, number), view.offset + view.size // 3)
    assert not sound(folder)
    done = repair_cache(encoder, folder, tmp_path / "pictures")
    assert (done.shards, done.pictures, done.left) == (2, 3, [])
    assert shards(folder) == whole and sound(folder)
    done = repair_cache(encoder, folder, tmp_path / "pictures")
    assert (done.shards, done.pictures, done.left) == (0, 0, [])
    assert shards(folder) == whole


@pytest.mark.parametrize("seen", [False, True])
def test_a_shard_without_its_header_is_made_again_from_the_index(tmp_path, made, pictures, seen):
    before = contents(made)
    if seen:
        shard(made, 1).write_bytes(shard(made, 1).read_bytes()[:-1])
        with EmbeddingCache.open(made) as cache:  # the index is made again, without the shard
            assert "007.png" not in cache
            assert sum("lost its features" in str(problem) for problem in cache.verify()) == 5
    else:
        flip(shard(made, 1), 100)
    encoder = Slicer()
    done = repair_cache(encoder, made, tmp_path / "pictures")
    assert (done.shards, done.pictures, done.left) == (1, 5, []) and sum(encoder.batches) == 5
    assert not shard(made, 1).exists() and contents(made) == before and sound(made)
    assert write_cache(Slicer(), pictures, made).known == 13


def test_what_cannot_be_repaired_is_named_and_kept(tmp_path, made, pictures):
    rows = read_header(shard(made, 0)).rows
    for row in rows[:2]:
        flip(shard(made, 0), row.views[0].offset)
    pictures[0][1].unlink()
    flip(shard(made, 1), 50)
    shutil.copy(pictures[1][1], pictures[7][1])
    done = repair_cache(Slicer(), made, tmp_path / "pictures")
    assert dict(done.left) == {
        "000.png": "No such file or directory",
        "007.png": "it is another picture now",
    }
    assert shard(made, 1).exists()
    with EmbeddingCache.open(made) as cache:
        problems = "\n".join(map(str, cache.verify()))
        assert "000.png in shard" in problems and "007.png has lost" in problems
        for name in ("001.png", "002.png", "006.png", "012.png"):
            assert cache[name].views
        with pytest.raises(CacheError, match="000.png .*are damaged"):
            cache["000.png"]


def test_a_shard_that_no_index_knows_is_said_to_be_so(tmp_path, made):
    flip(shard(made, 1), 100)
    (made / "index.sqlite").unlink()
    for _ in range(2):
        ((what, why),) = repair_cache(Slicer(), made, tmp_path / "pictures").left
        assert what == "shard-000001.safetensors" and "No index has the names" in why


def test_repair_needs_the_same_encoder(tmp_path, pictures):
    write_cache(siglip(), pictures, tmp_path / "cache")
    with pytest.raises(CacheError, match=r"sha256 \("):
        repair_cache(siglip(seed=1), tmp_path / "cache", tmp_path / "pictures")
    with WriterLock(tmp_path / "cache"), pytest.raises(CacheError, match="being written"):
        repair_cache(siglip(), tmp_path / "cache", tmp_path / "pictures")


# Merge


def test_parts_become_a_single_runs_cache(tmp_path, made, pictures):
    whole, read = shards(made), contents(made)
    parts = []
    for number in (1, 2):
        earlier, own = Part(number, 2).cut(pictures, 5)
        parts.append(tmp_path / f"part-{number}")
        write_cache(Slicer(), own, parts[-1], earlier=earlier, **SIZES)
    inodes = [path.stat().st_ino for part in parts for path in sorted((part / "shards").iterdir())]
    merged = merge_caches(tmp_path / "all", parts)
    assert merged.shards == 3
    assert shards(tmp_path / "all") == whole and contents(tmp_path / "all") == read
    moved = [path.stat().st_ino for path in sorted((tmp_path / "all" / "shards").iterdir())]
    assert moved == inodes and sound(tmp_path / "all")
    assert all(shards(part) == {} for part in parts)
    assert merge_caches(tmp_path / "all", parts).shards == 0  # the same command again
    assert write_cache(Slicer(), pictures, tmp_path / "all").known == 13


def test_a_picture_in_two_caches_is_read_from_the_first(tmp_path, made, pictures):
    write_cache(siglip(), pictures[:8], tmp_path / "a", **SIZES)
    write_cache(siglip(), pictures[5:], tmp_path / "b", **SIZES)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    merge_caches(tmp_path / "a", [tmp_path / "b"])
    for _ in range(2):
        assert contents(tmp_path / "a") == second | first
        (tmp_path / "a" / "index.sqlite").unlink()
    with EmbeddingCache.open(tmp_path / "a") as cache:
        assert len(cache) == 13


def test_caches_that_differ_are_not_merged(tmp_path, made, pictures):
    for name, options, field in (
        ("codec", {"codec": "bf16"}, r"codec \("),
        ("batch", {"batch_size": 4}, r"batch_size \(3 in .*, 4 in "),
    ):
        write_cache(Slicer(), pictures[:3], tmp_path / name, **{**SIZES, **options})
        before = shards(tmp_path / name), shards(made)
        for out in (made, tmp_path / "new"):
            folders = [tmp_path / name] if out == made else [made, tmp_path / name]
            with pytest.raises(CacheError, match=field):
                merge_caches(out, folders)
        assert (shards(tmp_path / name), shards(made)) == before
    write_cache(siglip(), pictures[:3], tmp_path / "siglip", **SIZES)
    with pytest.raises(CacheError, match=r"encoder.model_type \("):
        merge_caches(made, [tmp_path / "siglip"])
    with pytest.raises(CacheError, match="named twice"):
        merge_caches(made, [made])
    with pytest.raises(CacheError, match="holds no embedding cache"):
        merge_caches(made, [tmp_path / "nowhere"])


def test_busy_or_damaged_caches_are_not_merged(tmp_path, made, pictures):
    write_cache(Slicer(), pictures[:6], tmp_path / "b", **SIZES)
    with WriterLock(tmp_path / "b"), pytest.raises(CacheError, match="being written"):
        merge_caches(made, [tmp_path / "b"])
    flip(shard(tmp_path / "b", 1), 77)
    with pytest.raises(CacheError, match="shard-000001.* is damaged"):
        merge_caches(made, [tmp_path / "b"])
    assert len(shards(tmp_path / "b")) == 2 and len(shards(made)) == 3


def other_disk(monkeypatch: pytest.MonkeyPatch, part: Path) -> None:
    real = durable.publish

    def publish(partial: Path, final: Path) -> None:
        if partial.is_relative_to(part):
            raise OSError(errno.EXDEV, "another disk")
        real(partial, final)

    monkeypatch.setattr("mlxvlm.cache.merge.publish", publish)


def test_a_shard_goes_to_another_disk_whole(tmp_path, pictures, monkeypatch):
    write_cache(Slicer(), pictures, tmp_path / "b", **SIZES)
    whole = shards(tmp_path / "b")
    other_disk(monkeypatch, tmp_path / "b")
    unlink = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("shard-"):  # copied, and about to go
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_caches(tmp_path / "a", [tmp_path / "b"])
    assert len(shards(tmp_path / "a")) == 1 and len(shards(tmp_path / "b")) == 3
    merged = merge_caches(tmp_path / "a", [tmp_path / "b"])
    assert (merged.shards, merged.already) == (2, 1)
    assert shards(tmp_path / "a") == whole and shards(tmp_path / "b") == {}


def test_a_full_disk_stops_a_merge_without_loss(tmp_path, pictures, monkeypatch):
    write_cache(Slicer(), pictures, tmp_path / "b", **SIZES)
    whole = shards(tmp_path / "b")
    other_disk(monkeypatch, tmp_path / "b")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("mlxvlm.cache.merge.sync", full)
        with pytest.raises(CacheError, match=r"is full: .* are still to come"):
            merge_caches(tmp_path / "a", [tmp_path / "b"])
    assert shards(tmp_path / "b") == whole and shards(tmp_path / "a") == {}
    merge_caches(tmp_path / "a", [tmp_path / "b"])
    assert shards(tmp_path / "a") == whole


# Prune


def test_only_what_the_data_name_stays(tmp_path, made, pictures):
    read = contents(made)
    size = sum(len(data) for data in shards(made).values())
    untouched = shard(made, 1).stat()
    keep = [name for name, _ in pictures if name not in ("001.png", "003.png")][:-3]
    done = prune_cache(made, alone(keep))
    assert (done.kept, done.dropped, done.rewritten, done.removed) == (8, 5, 1, 1)
    assert done.bytes == size - sum(len(data) for data in shards(made).values()) > 0
    assert contents(made) == {name: read[name] for name in keep} and sound(made)
    assert shard(made, 1).stat() == untouched and not shard(made, 2).exists()
    assert prune_cache(made, alone(keep)).dropped == 0
    (made / "index.sqlite").unlink()
    assert contents(made) == {name: read[name] for name in keep}
    write_cache(Slicer(), pictures, made)  # what was dropped may come back
    assert contents(made) == read


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_stays_keeps_its_bytes(tmp_path, pictures, codec):
    write_cache(siglip(), pictures, tmp_path / "cache", codec, **SIZES)
    read = contents(tmp_path / "cache")
    keep = [name for name, _ in pictures[1::2]]
    prune_cache(tmp_path / "cache", alone(keep))
    assert contents(tmp_path / "cache") == {name: read[name] for name in keep}
    assert sound(tmp_path / "cache")


def test_a_name_anywhere_keeps_its_picture_and_its_other_names(tmp_path, pictures):
    folder = tmp_path / "pictures"
    shutil.copy(pictures[0][1], folder / "twin.png")
    shutil.copy(pictures[1][1], folder / "zwin.png")
    (folder / "bad.png").write_bytes(b"")
    write_cache(Slicer(), listed(folder), tmp_path / "cache", **SIZES)
    keep = alone([str(folder / "twin.png"), "bad.png"])
    done = prune_cache(tmp_path / "cache", keep, images=folder)
    with EmbeddingCache.open(tmp_path / "cache", images=folder) as cache:
        assert cache["000.png"].sha256 == sha256(pictures[0][1]) == cache["twin.png"].sha256
        assert len(cache) == 1 and done.kept == 1 and "zwin.png" not in set(cache.names())
        assert cache.verify() == [] and [name for name, _ in cache.failures()] == ["bad.png"]


def test_records_that_nothing_reads_go_too(tmp_path, pictures):
    write_cache(Slicer(), pictures[:8], tmp_path / "a", **SIZES)
    write_cache(Slicer(), pictures[5:], tmp_path / "b", **SIZES)
    merge_caches(tmp_path / "a", [tmp_path / "b"])
    read = contents(tmp_path / "a")
    done = prune_cache(tmp_path / "a", alone(name for name, _ in pictures))
    assert done.dropped == 3 and contents(tmp_path / "a") == read and sound(tmp_path / "a")


def test_pruning_keeps_damage_known(made, pictures):
    view = read_header(shard(made, 0)).rows[2].views[0]
    flip(shard(made, 0), view.offset)
    prune_cache(made, alone(name for name, _ in pictures[1:]))
    with EmbeddingCache.open(made) as cache:
        with pytest.raises(CacheError, match="002.png .*are damaged"):
            cache["002.png"]
        np.testing.assert_equal(len(cache.verify()), 1)


def test_nothing_at_all_is_kept_by_mistake(made):
    whole = shards(made)
    with pytest.raises(CacheError, match="nothing was dropped"):
        prune_cache(made, alone(["elsewhere/000.png"]))
    with WriterLock(made), pytest.raises(CacheError, match="being written"):
        prune_cache(made, alone(["000.png"]))
    assert shards(made) == whole
