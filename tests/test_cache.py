"""The embedding cache: what is read is what was encoded, or an error says so."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from tiny_cache import Slicer, draw, listed, sha256, shards, siglip

from mlxvlm import durable
from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.codecs import BFloat16, Float16, Float32, Unfit
from mlxvlm.cache.format import Source, read_header, source_name
from mlxvlm.cache.inputs import picture_sources
from mlxvlm.cache.lock import WriterLock
from mlxvlm.cache.run import Summary
from mlxvlm.cache.shard import ShardWriter
from mlxvlm.cache.writer import write_cache
from mlxvlm.errors import CacheError, DataError

SIZES: dict[str, Any] = {"batch_size": 3, "shard_pictures": 5}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple[str, Path]]:
    return draw(tmp_path / "pictures", 13)


@pytest.fixture
def made(tmp_path: Path, pictures: list[tuple[str, Path]]) -> Path:
    """A cache of three shards, with views of different sizes."""
    write_cache(Slicer(), pictures, tmp_path / "cache", **SIZES)
    return tmp_path / "cache"


def encoded(encoder: Any, path: Path) -> list[np.ndarray]:
    """What the encoder says of one picture, without a cache."""
    return [np.array(v) for v in encoder.encode(encoder.look([path.read_bytes()]))[0].views]


def assert_right(folder: Path, pictures: list[tuple[str, Path]]) -> None:
    """Every picture reads as the Slicer encodes it."""
    with EmbeddingCache.open(folder) as cache:
        for name, path in pictures:
            for got, expected in zip(cache[name].views, encoded(Slicer(), path), strict=True):
                np.testing.assert_array_equal(got, expected)


# Codecs


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (7, 5)])
def test_float32_keeps_every_bit(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x.flat[0] = -0.0
    assert Float32().decode(Float32().encode(x).tobytes(), shape).tobytes() == x.tobytes()


def test_bf16_rounds_as_mlx_does():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 32)) * 10.0 ** rng.integers(-30, 30, (64, 32))).astype(np.float32)
    x[0, :6] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0, 1e-40, 3.3895e38]  # ties, tiny, huge
    codec = BFloat16()
    back = codec.decode(codec.encode(x).tobytes(), (64, 32))
    expected = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))
    normal = np.abs(x) > 1e-37  # MLX flushes subnormals on some devices
    np.testing.assert_array_equal(back[normal], expected[normal])
    assert np.abs(back / np.where(x == 0, 1, x) - 1)[normal].max() <= 2**-8


def test_fp16_rounds_as_numpy_does():
    x = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32) * 1000
    codec = Float16()
    back = codec.decode(codec.encode(x).tobytes(), (9, 8))
    np.testing.assert_array_equal(back, x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("codec", "value"), [(Float16(), 65536.0), (BFloat16(), 3.4e38)])
def test_a_codec_refuses_what_it_would_clip(codec, value):
    with pytest.raises(Unfit, match="16 ends at .* use the codec"):
        codec.encode(np.array([[1.0, -value]], dtype=np.float32))


@pytest.mark.parametrize("codec", ["float32", "bf16", "fp16"])
def test_a_cache_reads_back_what_was_encoded(tmp_path, pictures, codec):
    encoder = siglip()
    write_cache(encoder, pictures[:4], tmp_path / "cache", codec)
    pictures_seen = encoder.look([path for _, path in pictures[:4]])
    expected = encoder.encode(pictures_seen)  # the same batch, so the same bits
    tolerance = {"float32": 0, "bf16": 2**-8, "fp16": 2**-11}[codec]
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        for (name, path), want in zip(pictures, expected, strict=False):
            got = cache[name]
            np.testing.assert_allclose(got.array, np.array(want.array), rtol=tolerance, atol=1e-6)
            assert got.array.dtype == np.float32 and got.array.shape == (1, 16, 32)
            assert (got.sha256, got.size, got.grid) == (sha256(path), want.size, (1, 1))
        assert cache.verify() == []


def test_a_bfloat16_encoder_loses_nothing_in_bf16(tmp_path, pictures):
    encoder = siglip(dtype=mx.bfloat16)
    write_cache(encoder, pictures[:3], tmp_path / "cache", "bf16")
    expected = encoder.encode(encoder.look([path for _, path in pictures[:3]]))
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        for (name, _), want in zip(pictures, expected, strict=False):
            np.testing.assert_array_equal(
                cache[name].array, np.array(want.array.astype(mx.float32))
            )


# The format


def test_shards_are_safetensors_that_others_open(made, pictures):
    name, path = pictures[1]
    shard = made / "shards" / "shard-000000.safetensors"
    expected = encoded(Slicer(), path)
    tensors = mx.load(str(shard))
    with safe_open(shard, "np") as file:
        assert set(file.keys()) == set(tensors)
        for i, want in enumerate(expected):
            key = f"{sha256(path)}/default/{i}"
            np.testing.assert_array_equal(file.get_tensor(key), want)
            np.testing.assert_array_equal(np.array(tensors[key]), want)
        metadata = file.metadata()
    rows = {row[0]: row for row in json.loads(metadata["rows"])}
    assert rows[sha256(path)][1:4] == ["default", [1, len(expected)], [path_width(path), 16]]
    assert json.loads(metadata["about"]) == json.loads((made / "cache.json").read_text())


def path_width(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return image.width


def test_a_header_that_outgrows_its_room_moves_the_data(tmp_path, pictures):
    encoder = Slicer()
    few, many = [p for p in encoder.look([path.read_bytes() for _, path in pictures])][:2]
    about = {"format_version": 1, "codec": "float32"}
    (tmp_path / "shards").mkdir()
    shard = ShardWriter(tmp_path, 0, about, Float32(), ["a"])
    few.sha256, many.sha256 = "a" * 64, "b" * 64
    views = [np.full((3, 2), i, np.float32) for i in range(200)]
    shard.add(few, views[:1])
    shard.add(many, views)
    path = shard.finish([Source("a", 1, 1, "a" * 64)])
    header = read_header(path)
    assert header.start > 8192 and len(header.rows[1].views) == 200
    data = path.read_bytes()
    for i, view in enumerate(header.rows[1].views):
        assert data[view.offset : view.offset + view.size] == views[i].tobytes()
    assert len(mx.load(str(path))) == 201


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, pictures, monkeypatch):
    done = []

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}") if Path("/proc").exists() else "")
        done.append(("synced", path.name))

    def replace(source: Any, target: Any) -> None:
        done.append(("renamed", Path(target).name))
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("mlxvlm.durable.sys.platform", "linux")
    write_cache(Slicer(), pictures[:2], tmp_path / "cache")
    start = done.index(("renamed", "shard-000000.safetensors"))
    assert [kind for kind, _ in done[start - 1 : start + 2]] == ["synced", "renamed", "synced"]
    if Path("/proc").exists():
        assert done[start - 1][1] == "shard-000000.safetensors.partial"
        assert done[start + 1][1] == "shards"


@pytest.mark.parametrize("refused", [False, True])
def test_a_mac_syncs_past_the_drives_own_memory(tmp_path, monkeypatch, refused):
    calls = []

    def full_sync(fd: int, what: int) -> None:
        calls.append(what)
        if refused:
            raise OSError(errno.ENOTSUP, "not on this file system")

    monkeypatch.setattr("mlxvlm.durable.sys.platform", "darwin")
    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("fcntl.fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    with open(tmp_path / "a", "wb") as file:
        durable.sync(file.fileno())
    assert calls == ([51, "fsync"] if refused else [51])


# Resuming


def interrupt_after(updates: int, kind: type[BaseException]):
    seen = 0

    def progress(_: Summary) -> None:
        nonlocal seen
        seen += 1
        if seen == updates:
            raise kind

    return progress


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_resumed_cache_is_byte_identical(tmp_path, made, pictures, kind):
    whole = shards(made)
    for updates in range(1, 6):
        again = tmp_path / f"again-{updates}"
        with pytest.raises(kind):
            write_cache(Slicer(), pictures, again, progress=interrupt_after(updates, kind), **SIZES)
        assert not [p for p in again.rglob("*") if p.name.endswith((".partial", ".lock"))]
        finished = shards(again)
        assert finished == {name: whole[name] for name in finished}
        encoder = Slicer()
        write_cache(encoder, pictures, again)
        assert shards(again) == whole
        assert sum(encoder.batches) == max(0, len(pictures) - 5 * len(finished))


def test_an_interrupted_siglip_resumes_to_the_same_bits(tmp_path, pictures):
    encoder = siglip()
    write_cache(encoder, pictures, tmp_path / "whole", "bf16", **SIZES)
    with pytest.raises(KeyboardInterrupt):
        write_cache(
            encoder,
            pictures,
            tmp_path / "again",
            "bf16",
            progress=interrupt_after(3, KeyboardInterrupt),
            **SIZES,
        )
    write_cache(encoder, pictures, tmp_path / "again", "bf16")
    assert shards(tmp_path / "again") == shards(tmp_path / "whole")


def test_threads_do_not_change_the_bytes(tmp_path, made, pictures):
    write_cache(Slicer(), pictures, tmp_path / "one", workers=1, **SIZES)
    write_cache(Slicer(), pictures, tmp_path / "many", workers=7, **SIZES)
    assert shards(tmp_path / "one") == shards(tmp_path / "many") == shards(made)


def test_batches_do_not_cross_shards(tmp_path, pictures):
    encoder = Slicer()
    write_cache(encoder, pictures, tmp_path / "cache", **SIZES)
    assert encoder.batches == [3, 2, 3, 2, 3]


def test_what_a_killed_writer_left_is_swept_up(tmp_path, pictures):
    folder = tmp_path / "cache"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "shard-000000.safetensors.partial").write_bytes(b"half")
    (folder / "writer.lock").write_text("999999\n")
    (folder / "index.sqlite.partial").write_bytes(b"half")
    write_cache(Slicer(), pictures, folder, **SIZES)
    assert sorted(p.name for p in folder.iterdir()) == ["cache.json", "index.sqlite", "shards"]
    assert_right(folder, pictures)


def test_more_data_are_added_to_a_cache(tmp_path, pictures):
    folder = tmp_path / "cache"
    write_cache(Slicer(), pictures[:7], folder, **SIZES)
    before = shards(folder)
    summary = write_cache(Slicer(), pictures, folder)
    assert (summary.known, summary.encoded) == (7, 6)
    assert {name: shards(folder)[name] for name in before} == before
    assert_right(folder, pictures)


def test_nothing_is_done_twice(made, pictures):
    before = {p: p.stat().st_mtime_ns for p in (made / "shards").iterdir()}
    encoder = Slicer()
    summary = write_cache(encoder, pictures, made)
    assert (encoder.batches, summary.known, summary.shards) == ([], 13, 0)
    assert {p: p.stat().st_mtime_ns for p in (made / "shards").iterdir()} == before


def test_the_first_damaged_shard_stops_a_writer_with_a_way_out(made, pictures):
    whole = shards(made)
    last = sorted((made / "shards").iterdir())[-1]
    flip(last, 100)
    os.utime(last)
    with pytest.raises(CacheError, match=f"{last.name} is damaged.*Delete that file"):
        write_cache(Slicer(), pictures, made)
    last.unlink()
    write_cache(Slicer(), pictures, made)
    assert shards(made) == whole


def test_a_lost_shard_in_the_middle_is_made_again(made, pictures):
    (made / "shards" / "shard-000001.safetensors").unlink()
    with EmbeddingCache.open(made) as cache:
        assert len(cache) == 8 and "007.png" not in cache
    summary = write_cache(Slicer(), pictures, made)
    assert (summary.known, summary.encoded) == (8, 5)
    assert_right(made, pictures)


# One picture, many names


def test_a_picture_is_its_content(tmp_path, pictures):
    folder = tmp_path / "pictures"
    for i in range(9):
        shutil.copy(pictures[2][1], folder / f"copy{i}.png")
    encoder = Slicer()
    everything = listed(folder)
    summary = write_cache(encoder, everything, tmp_path / "cache", **SIZES)
    assert sum(encoder.batches) == 13 == summary.encoded and summary.duplicates == 9
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 13 and cache.totals().names == 22
        assert sorted(cache) == sorted({sha256(path) for _, path in pictures})
        assert list(cache.names()) == sorted(name for name, _ in everything)
        for name in ("002.png", "copy0.png", "copy8.png", sha256(pictures[2][1])):
            assert name in cache
            assert cache[name].sha256 == sha256(pictures[2][1])
    assert_right(tmp_path / "cache", everything)


def test_names_outlive_the_pictures(made, pictures, tmp_path):
    expected = {name: encoded(Slicer(), path) for name, path in pictures}
    shutil.rmtree(tmp_path / "pictures")
    (made / "index.sqlite").unlink()
    with EmbeddingCache.open(made) as cache:
        for name, views in expected.items():
            np.testing.assert_array_equal(cache[name].views[0], views[0])
    assert write_cache(Slicer(), pictures, made).known == 13


def test_a_file_that_changed_is_encoded_anew(tmp_path, made, pictures):
    draw(tmp_path / "other", 1, seed=9)
    shutil.copy(tmp_path / "other" / "000.png", pictures[4][1])
    summary = write_cache(Slicer(), pictures, made)
    assert (summary.known, summary.encoded) == (12, 1)
    assert_right(made, pictures)


def test_names_are_found_as_the_data_write_them(tmp_path, pictures):
    root = tmp_path / "pictures"
    sources = [("sub/../a//b.png", pictures[0][1]), ("cafe\u0301.png", pictures[1][1])]
    write_cache(Slicer(), sources, tmp_path / "cache")
    with EmbeddingCache.open(tmp_path / "cache", images=root) as cache:
        for name in ("a/b.png", "./a/b.png", Path("a/b.png"), root / "a/b.png"):
            assert cache[name].sha256 == sha256(pictures[0][1])
        assert "caf\u00e9.png" in cache and "cafe\u0301.png" in cache
        assert "b.png" not in cache and 3 not in cache
    assert source_name("/elsewhere/a.png", root) == "/elsewhere/a.png"


def test_one_name_for_two_files_is_refused(tmp_path, pictures):
    with pytest.raises(CacheError, match="'a' stands for both"):
        write_cache(Slicer(), [("a", pictures[0][1]), ("./a", pictures[1][1])], tmp_path / "c")


# Bad pictures


def test_bad_pictures_cost_themselves(tmp_path, pictures):
    folder = tmp_path / "pictures"
    (folder / "005.png").write_bytes(b"not a picture")
    (folder / "006.png").write_bytes((folder / "007.png").read_bytes()[:60])
    (folder / "012.png").unlink()
    os.mkfifo(folder / "011b.png")
    sources = [*listed(folder), ("012.png", folder / "012.png")]
    summary = write_cache(Slicer(), sources, tmp_path / "cache", **SIZES)
    reasons = dict(summary.failures)
    assert set(reasons) == {"005.png", "006.png", "011b.png", "012.png"}
    assert "not a picture" in reasons["005.png"] and "No such file" in reasons["012.png"]
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert dict(cache.failures()) == reasons and len(cache) == 10
        assert "005.png" not in cache
        with pytest.raises(CacheError, match="005.png could not be cached.*not a picture"):
            cache["005.png"]
        assert cache.verify() == []
    before = shards(tmp_path / "cache")

    encoder = Slicer()  # nothing has become better: nothing is written
    summary = write_cache(encoder, sources, tmp_path / "cache")
    assert (encoder.batches, dict(summary.failures)) == ([], reasons)
    assert shards(tmp_path / "cache") == before

    shutil.copy(draw(tmp_path / "other", 1, seed=5)[0][1], folder / "005.png")
    encoder = Slicer()  # one has: only that one is encoded, into a further shard
    summary = write_cache(encoder, sources, tmp_path / "cache")
    assert encoder.batches == [1] and len(summary.failures) == 3
    after = shards(tmp_path / "cache")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert cache["005.png"].sha256 == sha256(folder / "005.png")
        assert len(cache.failures()) == 3
        (cache.folder / "index.sqlite").unlink()
    assert_right(tmp_path / "cache", [s for s in sources if s[0] not in dict(summary.failures)])


def test_a_bad_picture_does_not_move_a_boundary(tmp_path, made, pictures):
    (tmp_path / "pictures" / "001.png").write_bytes(b"")
    write_cache(Slicer(), pictures, tmp_path / "other", **SIZES)
    ours, theirs = shards(tmp_path / "other"), shards(made)
    assert list(ours) == list(theirs)
    assert [n for n in ours if ours[n] != theirs[n]] == ["shard-000000.safetensors"]


@pytest.mark.parametrize(
    ("codec", "value", "why"),
    [
        ("float32", float("nan"), "not finite"),
        ("bf16", float("inf"), "not finite"),
        ("fp16", 70000.0, "70000.*fp16"),
    ],
)
def test_features_that_cannot_be_stored_fail_their_picture(tmp_path, pictures, codec, value, why):
    encoder = Slicer()
    shutil.copy(pictures[6][1], tmp_path / "pictures" / "twin.png")
    encoder.spoil[sha256(pictures[6][1])] = value
    sources = listed(tmp_path / "pictures")
    summary = write_cache(encoder, sources, tmp_path / "cache", codec, **SIZES)
    assert [name for name, _ in summary.failures] == ["006.png", "twin.png"]
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 12
        for name in ("006.png", "twin.png"):
            with pytest.raises(CacheError, match=why):
                cache[name]
        assert cache.verify() == []


def test_strict_caches_the_others_and_fails(tmp_path, pictures):
    pictures[3][1].write_bytes(b"")
    with pytest.raises(CacheError, match="1 of 13 pictures.*\n.*003.png"):
        write_cache(Slicer(), pictures, tmp_path / "cache", strict=True)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 12


def test_no_usable_picture_at_all_is_an_error(tmp_path, pictures):
    with pytest.raises(CacheError, match="none of the 1 pictures.*No such file"):
        write_cache(Slicer(), [("a", tmp_path / "a")], tmp_path / "cache")


# Damage


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flips a bit as a bad disk does: neither size nor time tell."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def reads(folder: Path, pictures: list[tuple[str, Path]]) -> int:
    """Reads everything; each picture is right or a CacheError. Returns the number of errors."""
    errors = 0
    with EmbeddingCache.open(folder) as cache:
        for name, path in pictures:
            try:
                views = cache[name].views
            except CacheError:
                errors += 1
                continue
            for got, expected in zip(views, encoded(Slicer(), path), strict=True):
                np.testing.assert_array_equal(got, expected)
    return errors


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_no_bit_of_a_shard_flips_unseen(made, pictures, index):
    shard = made / "shards" / "shard-000001.safetensors"
    sound = shard.read_bytes()
    start = read_header(shard).start
    with EmbeddingCache.open(made):
        pass  # makes sure that there is an index
    rng = np.random.default_rng(1)
    places = [0, 7, 8, 30, 40, 150, start - 1, start, len(sound) - 1]
    places += [int(p) for p in rng.integers(0, len(sound), 12)]
    for place in places:
        flip(shard, place, int(rng.integers(0, 8)))
        if index == "lost":
            (made / "index.sqlite").unlink(missing_ok=True)
        with EmbeddingCache.open(made) as cache:
            problems = cache.verify()
        assert problems and any(shard.name == problem.shard for problem in problems), place
        errors = reads(made, pictures)
        assert errors == 1 if place >= start else errors in (0, 5), place
        flip_back(shard, sound)
    if index == "lost":
        (made / "index.sqlite").unlink()
    with EmbeddingCache.open(made) as cache:
        assert cache.verify() == []


def flip_back(path: Path, sound: bytes) -> None:
    state = path.stat()
    path.write_bytes(sound)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_damaged_record_names_its_picture_and_the_way_out(made, pictures):
    header = read_header(made / "shards" / "shard-000002.safetensors")
    view = header.rows[1].views[0]
    flip(made / "shards" / "shard-000002.safetensors", view.offset + view.size // 2)
    with EmbeddingCache.open(made) as cache:
        with pytest.raises(CacheError, match="011.png in shard .*shard-000002.*cache repair"):
            cache["011.png"]
        (problem,) = map(str, cache.verify())
        assert "011.png" in problem and "shard-000002" in problem
        cache["010.png"]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_shard_is_noticed(made, pictures, size):
    shard = made / "shards" / "shard-000000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with EmbeddingCache.open(made) as cache:
        assert "shard-000000" in cache.damaged_shards()[0]
        with pytest.raises(CacheError, match="shard-000000.* is damaged.*Delete"):
            cache["000.png"]
    assert reads(made, pictures) == 5


def test_bits_of_the_index_never_lead_to_a_wrong_row(made, pictures):
    index = made / "index.sqlite"
    with EmbeddingCache.open(made):
        pass
    sound = index.read_bytes()
    rng = np.random.default_rng(2)
    used = [i for i in range(len(sound)) if sound[i]]  # most of a small database is empty
    for place in [int(p) for p in rng.choice(used, 60)]:
        flip(index, place, int(rng.integers(0, 8)))
        assert reads(made, pictures) == 0, place
        index.write_bytes(sound)


def test_a_damaged_name_in_the_index_is_not_believed(made, pictures):
    with sqlite3.connect(made / "index.sqlite") as db:
        db.execute("UPDATE names SET sha256 = ? WHERE name = '003.png'", (sha256(pictures[4][1]),))
        db.execute("UPDATE names SET name = 'xyz' WHERE name = '008.png'")
    db.close()
    assert reads(made, pictures) == 0


def test_a_lost_or_foreign_index_gives_the_same_lookups(tmp_path, made, pictures):
    def everything() -> list[Any]:
        with EmbeddingCache.open(made) as cache:
            return [list(cache), list(cache.names()), cache.totals(), cache.failures()]

    expected = everything()
    write_cache(Slicer(), draw(tmp_path / "other", 2, seed=7), tmp_path / "foreign")
    for damage in (
        lambda index: index.unlink(),
        lambda index: index.write_bytes(b"not a database at all" * 100),
        lambda index: index.write_bytes(b""),
        lambda index: index.write_bytes(index.read_bytes()[:5000]),
        lambda index: shutil.copy(tmp_path / "foreign" / "index.sqlite", index),
    ):
        damage(made / "index.sqlite")
        assert everything() == expected
        assert (made / "index.sqlite").exists()


def test_a_copied_cache_is_the_same_cache(tmp_path, made, pictures):
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    assert reads(tmp_path / "copy", pictures) == 0
    assert write_cache(Slicer(), pictures, tmp_path / "copy").known == 13


def test_a_lost_cache_json_is_rebuilt_from_the_shards(made, pictures):
    about = (made / "cache.json").read_bytes()
    for damage in (b"", b"{", None, b"\xff\xfe"):
        if damage is None:
            (made / "cache.json").unlink()
        else:
            (made / "cache.json").write_bytes(damage)
        assert reads(made, pictures) == 0
        write_cache(Slicer(), pictures, made)
        assert (made / "cache.json").read_bytes() == about


def test_cache_json_and_shards_must_agree(made):
    about = json.loads((made / "cache.json").read_text())
    about["encoder"]["dtype"] = "bfloat16"
    (made / "cache.json").write_text(json.dumps(about))
    with pytest.raises(
        CacheError, match=r"encoder.dtype \(\"float32\" in the shard, \"bfloat16\" in c"
    ):
        EmbeddingCache.open(made)


def test_a_shard_of_another_cache_is_not_taken_in(tmp_path, made, pictures):
    write_cache(Slicer(), pictures[:1], tmp_path / "other", "bf16", **SIZES)
    shutil.copy(
        tmp_path / "other" / "shards" / "shard-000000.safetensors",
        made / "shards" / "shard-000009.safetensors",
    )
    with pytest.raises(CacheError, match=r"shard-000009.* does not belong.*codec \(\"bfloat16\""):
        EmbeddingCache.open(made)


# Identities


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "encoder.sha256"),
        ({"dtype": mx.bfloat16}, "encoder.dtype"),
        ({"pool": "mean2"}, "encoder.pool"),
    ],
)
def test_another_encoder_is_refused_by_field(tmp_path, pictures, change, field):
    folder = tmp_path / "cache"
    write_cache(siglip(), pictures[:2], folder)
    other = siglip(**change)
    with pytest.raises(CacheError, match=field.replace(".", r"\.")):
        write_cache(other, pictures, folder)
    with EmbeddingCache.open(folder) as cache:
        cache.require(siglip().identity())
        with pytest.raises(CacheError, match=field.removeprefix("encoder.")):
            cache.require(other.identity())
        assert len(cache) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "bf16"}, r'codec \("float32" in the cache, "bfloat16" here\)'),
        ({"batch_size": 4}, r"batch_size \(3 in the cache, 4 here\)"),
        ({"shard_pictures": 9}, r"shard_pictures \(5 in the cache, 9 here\)"),
        ({"codec": "int3"}, r"codec \(='int3'\) must be one of float32, bf16, fp16, int8, int4"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_another_way_of_writing_is_refused(made, pictures, options, message):
    with pytest.raises(CacheError, match=message):
        write_cache(Slicer(), pictures, made, **options)


def test_a_newer_format_is_refused(made, pictures):
    about = json.loads((made / "cache.json").read_text())
    (made / "cache.json").write_text(json.dumps({**about, "format_version": 2}))
    for act in (lambda: EmbeddingCache.open(made), lambda: write_cache(Slicer(), pictures, made)):
        with pytest.raises(CacheError, match="format_version must be 1, but .* says 2"):
            act()


def test_a_folder_of_other_files_is_not_written_to(tmp_path, pictures):
    with pytest.raises(CacheError, match="holds other files"):
        write_cache(Slicer(), pictures, tmp_path)
    with pytest.raises(CacheError, match="is a file"):
        write_cache(Slicer(), pictures, pictures[0][1])
    with pytest.raises(CacheError, match="holds no embedding cache"):
        EmbeddingCache.open(tmp_path)


# Writers, readers


def test_a_second_writer_is_refused_with_the_first_ones_pid(made, pictures):
    with WriterLock(made):
        with pytest.raises(CacheError, match=f"pid {os.getpid()}"):
            write_cache(Slicer(), pictures, made)
        assert_right(made, pictures)  # readers may go on, even with no index of their own
        (made / "index.sqlite").unlink()
        assert_right(made, pictures)
        assert not (made / "index.sqlite").exists()
    assert not (made / "writer.lock").exists()


def test_a_reader_sees_what_a_writer_has_finished(tmp_path, pictures):
    seen = []

    def progress(_: Summary) -> None:
        with EmbeddingCache.open(tmp_path / "cache") as cache:
            seen.append(len(cache))

    write_cache(Slicer(), pictures, tmp_path / "cache", progress=progress, **SIZES)
    # Shards are written behind the encoder, so that a report may come before one or after two.
    assert seen == sorted(seen) and seen[-1] == 13 and set(seen) <= {0, 5, 10, 13}


def test_many_threads_read_in_any_order(made, pictures):
    expected = {name: encoded(Slicer(), path) for name, path in pictures}
    errors: list[BaseException] = []
    with EmbeddingCache.open(made) as cache:
        cache._shards.limit = 1  # so that shards are closed under their readers

        def work(seed: int) -> None:
            try:
                for i in np.random.default_rng(seed).integers(0, 13, 60):
                    name = pictures[i][0]
                    for got, want in zip(cache[name].views, expected[name], strict=True):
                        np.testing.assert_array_equal(got, want)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_few_files_stay_open(tmp_path, pictures):
    write_cache(Slicer(), pictures, tmp_path / "cache", shard_pictures=1)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        cache._shards.limit = 4
        before = len(os.listdir("/dev/fd"))
        for name, _ in pictures:
            cache[name]
        assert len(os.listdir("/dev/fd")) - before <= 4


def test_a_cache_travels_to_a_worker_and_closes(made):
    cache = EmbeddingCache.open(made)
    other = pickle.loads(pickle.dumps(cache))
    cache.close()
    cache.close()
    with pytest.raises(CacheError, match="was closed"):
        cache["000.png"]
    assert other.cut("002.png").views == len(other["002.png"].views) > 1
    other.close()


def test_what_is_missing_is_said(made):
    with EmbeddingCache.open(made) as cache:
        for key in ("nowhere.png", "0" * 64):
            assert key not in cache
            with pytest.raises(CacheError, match=f"{key} is not in the cache .*cache-embeddings"):
                cache[key]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_with_what_is_needed_and_resumes(tmp_path, pictures, number, monkeypatch):
    from mlxvlm.cache import shard as shard_module

    write_cache(Slicer(), pictures, tmp_path / "whole", **SIZES)
    real, written = shard_module.write_all, 0

    def write_all(fd: int, data: Any) -> None:
        nonlocal written
        written += len(data)
        if written > 40_000:
            raise OSError(number, os.strerror(number))
        real(fd, data)

    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "write_all", write_all)
        with pytest.raises(CacheError, match=r"is full: about [\d.]+ \w+ are needed for the \d"):
            write_cache(Slicer(), pictures, folder, **SIZES)
    assert 0 < len(shards(folder)) < 3
    with EmbeddingCache.open(folder) as cache:
        assert cache.verify() == []
    write_cache(Slicer(), pictures, folder)
    assert shards(folder) == shards(tmp_path / "whole")


# Input


def test_rows_name_the_pictures(tmp_path, pictures):
    data = tmp_path / "data"
    data.mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    text = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    rows = [
        {"id": "1", "image": "000.png", "conversations": turns},
        {"id": "2", "conversations": text},
        {"id": "3", "image": "001.png", "conversations": turns},
        {"id": "4", "image": "000.png", "conversations": turns},
        {"id": "5", "image": "001.png"},
    ]
    (data / "llava.json").write_text(json.dumps(rows))
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines = [
        {"images": ["002.png", "000.png"], "messages": messages},
        {"messages": messages},
        {"image": "001.png", "text": "a caption"},
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = tmp_path / "pictures"
    sources, bad = picture_sources(data / "llava.json", root)
    assert sources == [(name, str(root / name), 1) for name in ("000.png", "001.png")]
    assert [where for where, _ in bad] == ["llava.json[4]"]
    found = [(s.name, s.among) for s in picture_sources(data, root)[0]]
    assert found == [("002.png", 2), ("000.png", 2), ("001.png", 1)]
    assert picture_sources(root)[0] == [(name, str(path), 1) for name, path in pictures]
    with pytest.raises(DataError, match="--images must name a folder"):
        picture_sources(data, tmp_path / "nowhere")
    (data / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=f"^{data} names no pictures"):
        picture_sources([data], root)
    with pytest.raises(DataError, match="names no pictures"):
        picture_sources(data)


def test_a_sealed_index_is_checked_without_reading_its_rows(made, pictures, monkeypatch):
    import mlxvlm.cache.index as module

    rows = []
    sound = module.sound
    monkeypatch.setattr(module, "sound", lambda row: rows.append(row) or sound(row))
    with EmbeddingCache.open(made) as cache:
        before = len(rows)
        assert "nowhere.png" not in cache and len(rows) == before
    index = made / "index.sqlite"
    with sqlite3.connect(index) as db:  # a commit that is not a seal breaks the seal
        db.execute("UPDATE names SET name = 'nowhere.png' WHERE name = '004.png'")
    db.close()
    with EmbeddingCache.open(made) as cache:
        assert "004.png" in cache and "nowhere.png" not in cache  # read whole, and made again
        assert len(rows) > before
