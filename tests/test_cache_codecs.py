"""int8 and int4: small errors, the same bytes at every resume, and the same values on a device."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from tiny_cache import Slicer, draw, sha256, shards, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache import shard as shard_module
from mlxvlm.cache.calibrate import calibrate
from mlxvlm.cache.codecs import CODECS, codec_named, describe_codec, described_codec, record_size
from mlxvlm.cache.codecs import settled as settle
from mlxvlm.cache.format import read_header
from mlxvlm.cache.jobs import Job, distinct
from mlxvlm.cache.packed import unpack
from mlxvlm.cache.quantised import Int4, Int8
from mlxvlm.cache.run import Summary
from mlxvlm.cache.whitening import Calibration, Unfit, Whitening
from mlxvlm.cache.writer import write_cache
from mlxvlm.data.feed import Pictures
from mlxvlm.errors import CacheError
from mlxvlm.images.picture import Features

SIZES: dict[str, Any] = {"batch_size": 3, "shard_pictures": 5}
WHITENED = ["int8", "int4"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple[str, Path]]:
    return draw(tmp_path / "pictures", 13)


def outliers(views: int, tokens: int, width: int, seed: int = 0) -> np.ndarray:
    """[views, tokens, width] with heavy tails, a few huge channels far from zero, loud tokens."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal(width))
    loud = rng.choice(width, max(1, width // 100), replace=False)
    sizes[loud] *= rng.uniform(12, 40, len(loud))
    basis = rng.standard_normal((64, width)) / 8
    x = 0.8 * rng.standard_normal((views, tokens, 64)) @ basis
    x += 0.45 * rng.standard_t(5, (views, tokens, width))
    x[:, rng.random(tokens) < 0.01] *= 5
    x += rng.standard_normal(width)
    return (x * sizes).astype(np.float32)


def calibrated(views: np.ndarray) -> Whitening:
    calibration = Calibration()
    for view in views:
        calibration.add(view)
    return calibration.whitening()


def back(codec: Any, view: np.ndarray) -> np.ndarray:
    record = codec.encode(view)
    assert record.nbytes == record_size(codec, view.shape)
    return codec.decode(record.tobytes(), view.shape)


def errors(view: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """(relative error, worst channel's RMS error over its deviation)."""
    view = view.astype(np.float64)
    off = found - view
    worst = np.sqrt((off**2).mean(axis=0)) / np.maximum(view.std(axis=0), 1e-30)
    return float(np.linalg.norm(off) / np.linalg.norm(view)), float(worst.max())


# Calibration


def test_calibration_is_the_mean_and_deviation_of_every_token():
    views = outliers(5, 40, 30)
    found = calibrated(views)
    flat = views.reshape(-1, 30).astype(np.float64)
    np.testing.assert_allclose(found.mean, flat.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.scale, flat.std(axis=0), rtol=1e-6)


def test_calibration_of_far_off_channels_keeps_their_deviation():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 50, 4)).astype(np.float32)
    x[..., 1] = 3e4 + 0.01 * x[..., 1]
    found = calibrated(x)
    np.testing.assert_allclose(found.scale, x.reshape(-1, 4).astype(np.float64).std(0), rtol=1e-5)


def test_a_still_channel_is_kept_and_may_move_later():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 50, 70)).astype(np.float32)
    x[..., 3] = -7.25
    x[..., 4] = 0.0
    whitening = calibrated(x)
    later = x[0].copy()
    later[:, 3] += rng.standard_normal(50)
    for codec, limit in ((Int8(whitening), 0.03), (Int4(whitening), 0.2)):
        found = back(codec, x[0])
        np.testing.assert_allclose(found[:, 3:5], x[0][:, 3:5], atol=1e-6 if limit < 0.1 else 0.2)
        assert errors(later[:, 5:], back(codec, later)[:, 5:])[1] < limit
        assert np.sqrt(np.mean((back(codec, later) - later)[:, 3] ** 2)) < limit


def test_features_that_are_all_the_same_come_back():
    x = np.full((2, 6, 8), 3.5, np.float32)
    for codec in (Int8(calibrated(x)), Int4(calibrated(x))):
        np.testing.assert_array_equal(back(codec, x[0]), x[0])
        np.testing.assert_array_equal(back(codec, 0 * x[0]), 0 * x[0])


def test_what_a_shard_says_of_its_codec_is_exact():
    codec = Int8(calibrated(outliers(2, 30, 50) * 1e-6))
    again = described_codec(json.dumps(describe_codec(codec))).whitening
    assert again is not None and codec.whitening is not None
    assert again.mean.tobytes() == codec.whitening.mean.tobytes()
    assert again.scale.tobytes() == codec.whitening.scale.tobytes()


# Errors


def test_int8_errs_little_in_every_channel_of_a_real_width():
    views = outliers(3, 729, 1152)
    whitening = calibrated(views[:2])
    view = views[2]  # not one that it was calibrated on
    codec = Int8(whitening)
    relative, worst = errors(view, back(codec, view))
    assert relative < 0.01 and worst < 0.03
    header = len(json.dumps(describe_codec(codec))) / 256 + 1000  # a picture's part of it
    assert (record_size(codec, (729, 1152)) + header) / (2 * 729 * 1152) < 0.505
    relative, worst = errors(view, back(Int4(whitening), view))
    assert relative < 0.12 and worst < 0.2


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 64), (65, 100), (130, 192)])
def test_any_shape_comes_back(name, shape):
    views = outliers(4, *shape)
    codec = settle(codec_named(name), calibrated(views))
    for view in views:
        found = back(codec, view)
        assert found.dtype == np.float32 and found.shape == shape
        white = (found - view) / codec.whitening.scale  # type: ignore[union-attr]
        step = np.abs((view - codec.whitening.mean) / codec.whitening.scale).max()  # type: ignore
        assert np.abs(white).max() <= step * (0.51 / 127 if name == "int8" else 0.08)


@pytest.mark.parametrize("name", WHITENED)
def test_far_outside_the_calibration_only_that_token_suffers(name):
    views = outliers(4, 40, 128)
    codec = settle(codec_named(name), calibrated(views))
    for far in (1e4, 1e8, 1e20):
        view = views[0].copy()
        view[5] *= far
        view[9, 3] = far
        found = back(codec, view)
        assert np.isfinite(found).all()
        rest = np.delete(np.arange(40), [5, 9])
        np.testing.assert_array_equal(found[rest], back(codec, views[0])[rest])
        assert errors(view[5:6], found[5:6])[0] < (0.03 if name == "int8" else 0.3)
        assert abs(found[9, 3] / far - 1) < 0.02


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e30, -3e38])
def test_what_cannot_be_held_is_unfit(name, value):
    views = outliers(2, 6, 64)
    codec = settle(codec_named(name), calibrated(views))
    views[0, 3, 2] = value
    with pytest.raises(Unfit, match="use the codec bf16 or float32"):
        codec.encode(views[0])


def test_features_too_far_from_a_tiny_calibration_are_unfit():
    views = outliers(2, 6, 64) * np.float32(1e-25)
    for codec in (Int8(calibrated(views)), Int4(calibrated(views))):
        assert np.isfinite(back(codec, views[0])).all()
        with pytest.raises(Unfit, match="too far from"), np.errstate(over="ignore"):
            codec.encode(np.full((6, 64), 1e29, np.float32) * np.linspace(0, 1, 64, dtype="f"))


def test_another_width_is_unfit():
    codec = Int8(calibrated(outliers(2, 6, 64)))
    with pytest.raises(Unfit, match="65 wide"):
        codec.encode(np.zeros((6, 65), np.float32))


# On a device


@pytest.mark.parametrize("name", sorted(CODECS))
def test_mlx_decodes_as_numpy_does(name):
    views = outliers(3, 20, 72)
    codec = settle(codec_named(name), calibrated(views))
    records = [codec.encode(view).reshape(-1).view(np.uint8).tobytes() for view in views]
    found = codec.unpack(records, (20, 72))
    assert found.dtype == {"bf16": mx.bfloat16, "fp16": mx.float16}.get(name, mx.float32)
    expected = np.stack([codec.decode(record, (20, 72)) for record in records])
    found = np.array(found.astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)  # a device may fuse its adds


def test_int4_is_packed_as_mlx_packs():
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    codec = Int4(Whitening(np.zeros(128, np.float32), np.ones(128, np.float32)))
    found = np.array(codec.unpack([codec.encode(x).tobytes()], (8, 128)))[0]
    ours = np.linalg.norm(found - x)
    theirs = np.linalg.norm(np.array(mx.dequantize(*mx.quantize(mx.array(x), 64, 4), 64, 4)) - x)
    assert 0.9 < ours / theirs < 1.1


@pytest.mark.parametrize("name", sorted(CODECS))
def test_pictures_go_packed_to_a_gpu_and_decoded_to_a_cpu(tmp_path, pictures, name):
    write_cache(siglip(), pictures, tmp_path / "cache", name, **SIZES)
    names = [name for name, _ in pictures[2:8]]  # of two shards
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        feed = Pictures(None, tmp_path, cache)
        feed.packed = False
        found = [feed.get(name) for name in names]
        assert all(isinstance(one, Features) for one in found)
        expected = np.array(feed.views(found).astype(mx.float32))
        feed.packed = True
        found = []
        thread = threading.Thread(target=lambda: found.extend(feed.get(name) for name in names))
        thread.start()
        thread.join()
        got = feed.views(found)
        assert got is not None and got.shape == (6, 16, 32)
        np.testing.assert_allclose(np.array(got.astype(mx.float32)), expected, atol=1e-6)


def test_unpack_keeps_the_order_of_pictures_of_several_calibrations(tmp_path, pictures):
    for i, part in enumerate((pictures[:5], pictures[5:10])):
        write_cache(siglip(), part, tmp_path / f"c{i}", "int8", **SIZES)
    one, two = (EmbeddingCache.open(tmp_path / f"c{i}") for i in (0, 1))
    order = [(one, 0), (one, 1), (two, 5), (one, 2), (two, 6)]
    packed = [cache.packed(pictures[i][0]) for cache, i in order]
    assert packed[0].codec is packed[1].codec and packed[0].codec is not packed[2].codec
    expected = np.concatenate([cache[pictures[i][0]].array for cache, i in order])
    np.testing.assert_allclose(np.array(unpack(packed)), expected, atol=1e-6)
    one.close()
    two.close()


# In a cache


@pytest.mark.parametrize("name", WHITENED)
def test_a_cache_reads_back_nearly_what_was_encoded(tmp_path, pictures, name):
    encoder = siglip()
    write_cache(encoder, pictures, tmp_path / "float32", **SIZES)
    write_cache(encoder, pictures, tmp_path / name, name, **SIZES)
    limits = {"int8": (0.01, 0.03), "int4": (0.15, 0.3)}[name]
    with (
        EmbeddingCache.open(tmp_path / "float32") as true,
        EmbeddingCache.open(tmp_path / name) as cache,
    ):
        assert cache.meta["codec"] == name and cache.verify() == []
        stacks = [np.concatenate([c[p].array[0] for p, _ in pictures]) for c in (true, cache)]
        assert all(e < limit for e, limit in zip(errors(*stacks), limits, strict=True))


@pytest.mark.parametrize("name", WHITENED)
def test_views_of_different_sizes_and_others_tools(tmp_path, pictures, name):
    """Each shard is a whole safetensors file that holds all that is needed to decode it."""
    write_cache(Slicer(), pictures, tmp_path / "cache", name, **SIZES)
    write_cache(Slicer(), pictures, tmp_path / "true", **SIZES)
    with (
        EmbeddingCache.open(tmp_path / "cache") as cache,
        EmbeddingCache.open(tmp_path / "true") as t,
    ):
        for key in cache:
            for found, true in zip(cache[key].views, t[key].views, strict=True):
                assert found.shape == true.shape
                assert np.abs(found - true).max() < (0.01 if name == "int8" else 0.15)
        digest = sha256(pictures[7][1])
        expected = cache[digest].views
    path = tmp_path / "cache" / "shards" / "shard-000001.safetensors"
    with safe_open(path, "np") as file:
        said = json.loads(file.metadata()["codec"])
    mean, scale = (np.array(said[k], np.float32) for k in ("mean", "scale"))
    tensors = mx.load(str(path))
    for i, view in enumerate(expected):
        q, s = (tensors[f"{digest}/default/{i}{part}"] for part in ("", ".scale"))
        if name == "int8":
            white = q.astype(mx.float32) * s[:, None]
        else:
            b = tensors[f"{digest}/default/{i}.bias"]
            s, b = s.astype(mx.float32), b.astype(mx.float32)
            white = mx.dequantize(q.view(mx.uint32), s, b, 64, 4)[:, :24]
        np.testing.assert_allclose(np.array(white) * scale + mean, view, atol=1e-6)


def test_all_shards_share_the_first_ones_calibration(tmp_path, pictures):
    write_cache(siglip(), pictures, tmp_path / "cache", "int8", **SIZES)
    paths = sorted((tmp_path / "cache" / "shards").iterdir())
    codecs = [read_header(path).codec for path in paths]
    assert len(codecs) == 3 and all(codec is codecs[0] for codec in codecs)
    write_cache(siglip(), pictures[:5], tmp_path / "first", "int8", **SIZES)
    assert shards(tmp_path / "first")["shard-000000.safetensors"] == paths[0].read_bytes()


def test_calibration_ends_within_a_long_shard(tmp_path, pictures, monkeypatch):
    encoder = siglip()
    monkeypatch.setattr(shard_module, "CALIBRATION_VIEWS", 4)
    write_cache(encoder, pictures, tmp_path / "cache", "int8", batch_size=3, shard_pictures=20)
    # Four views calibrate, but the batches stay as they are.
    seen = encoder.encode(encoder.look([path for _, path in pictures[:3]]))
    seen += encoder.encode(encoder.look([path for _, path in pictures[3:6]]))[:1]
    expected = calibrated(np.concatenate([np.array(one.array) for one in seen]))
    (path,) = (tmp_path / "cache" / "shards").iterdir()
    whitening = read_header(path).codec.whitening
    assert whitening is not None
    assert whitening.mean.tobytes() == expected.mean.tobytes()
    assert whitening.scale.tobytes() == expected.scale.tobytes()
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 13 and cache.verify() == []


@pytest.mark.parametrize("name", WHITENED)
def test_a_resumed_cache_is_byte_identical(tmp_path, pictures, name, monkeypatch):
    monkeypatch.setattr(shard_module, "CALIBRATION_VIEWS", 5)  # in the middle of the first shard
    summary = write_cache(Slicer(), pictures, tmp_path / "whole", name, **SIZES)
    whole = shards(tmp_path / "whole")
    for updates in range(1, 6):
        again = tmp_path / f"again-{updates}"

        def progress(seen: Summary, last: int = updates) -> None:
            progress.calls += 1  # type: ignore[attr-defined]
            if progress.calls == last:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        progress.calls = 0  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            write_cache(Slicer(), pictures, again, name, progress=progress, **SIZES)
        finished = shards(again)
        assert finished == {key: whole[key] for key in finished}
        write_cache(Slicer(), pictures, again, name)
        assert shards(again) == whole
    assert summary.bytes == sum(len(data) for data in whole.values())


def test_the_calibration_survives_the_first_shard(tmp_path, pictures):
    write_cache(Slicer(), pictures, tmp_path / "cache", "int8", **SIZES)
    whole = shards(tmp_path / "cache")
    (tmp_path / "cache" / "shards" / "shard-000000.safetensors").unlink()
    write_cache(Slicer(), pictures, tmp_path / "cache", "int8")
    after = shards(tmp_path / "cache")
    assert len(after) == 3
    # The same rows under another number: the number is not in the file.
    assert after["shard-000003.safetensors"] == whole["shard-000000.safetensors"]


def test_a_first_shard_of_nothing_but_failures_calibrates_nothing(tmp_path, pictures):
    for _, path in pictures[:5]:
        path.write_bytes(b"")
    write_cache(Slicer(), pictures, tmp_path / "cache", "int8", **SIZES)
    paths = sorted((tmp_path / "cache" / "shards").iterdir())
    assert [bool(read_header(path).codec.whitening) for path in paths] == [False, True, True]
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 8 and cache.verify() == []
        assert cache["009.png"].views[0].shape[1] == 24


def test_unfit_pictures_cost_themselves_while_calibrating(tmp_path, pictures):
    encoder = Slicer()
    encoder.spoil = {sha256(pictures[1][1]): float("nan"), sha256(pictures[2][1]): 1e31}
    summary = write_cache(encoder, pictures, tmp_path / "cache", "int8", **SIZES)
    reasons = dict(summary.failures)
    assert "not finite" in reasons["001.png"] and "1e+31" in reasons["002.png"]
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 11 and cache.verify() == []


def test_a_shard_with_another_calibration_reads_by_its_own(tmp_path, pictures):
    write_cache(siglip(), pictures[:5], tmp_path / "a", "int8", **SIZES)
    write_cache(siglip(), pictures[5:10], tmp_path / "b", "int8", **SIZES)
    with EmbeddingCache.open(tmp_path / "b") as cache:
        expected = cache[pictures[7][0]].array
    shutil.move(
        tmp_path / "b" / "shards" / "shard-000000.safetensors",
        tmp_path / "a" / "shards" / "shard-000001.safetensors",
    )
    with EmbeddingCache.open(tmp_path / "a") as cache:
        np.testing.assert_array_equal(cache[pictures[7][0]].array, expected)


@pytest.mark.parametrize("views", [4, 5, 512])
def test_a_part_of_a_list_is_calibrated_as_the_whole(tmp_path, pictures, views, monkeypatch):
    monkeypatch.setattr(shard_module, "CALIBRATION_VIEWS", views)
    encoder = Slicer()
    pictures[0][1].write_bytes(b"")
    shutil.copy(pictures[1][1], pictures[2][1])
    encoder.spoil = {sha256(pictures[3][1]): float("nan")}
    write_cache(encoder, pictures, tmp_path / "whole", "int8", **SIZES)
    found = calibrate(encoder, distinct(pictures), **SIZES)
    write_cache(encoder, pictures[5:], tmp_path / "part", "int8", whitening=found, **SIZES)
    whole, part = shards(tmp_path / "whole"), shards(tmp_path / "part")
    assert [*whole.values()][1:] == [*part.values()]


def test_nothing_to_calibrate_on(tmp_path):
    assert calibrate(Slicer(), [Job("a", tmp_path / "a")] * 7, 2, 3) is None


@pytest.mark.parametrize("name", WHITENED)
def test_no_bit_of_a_quantised_shard_flips_unseen(tmp_path, pictures, name):
    folder = tmp_path / "cache"
    write_cache(Slicer(), pictures, folder, name, **SIZES)
    with EmbeddingCache.open(folder) as cache:
        expected = {key: cache[key].views for key in cache}
    path = folder / "shards" / "shard-000001.safetensors"
    sound, state = path.read_bytes(), path.stat()
    rng = np.random.default_rng(0)
    start = read_header(path).start
    codec_at = sound.index(b'"codec":') + 40  # the mean itself
    for place in [codec_at, start, len(sound) - 1, *map(int, rng.integers(0, len(sound), 20))]:
        data = bytearray(sound)
        data[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        with EmbeddingCache.open(folder) as cache:
            assert cache.verify(), place
            bad = 0
            for key, views in expected.items():
                try:
                    found = cache[key].views
                except CacheError:
                    bad += 1
                    continue
                for got, want in zip(found, views, strict=True):
                    np.testing.assert_array_equal(got, want)
            # A header's bit costs the shard, for who decodes needs its mean and scale.
            assert bad == (1 if place >= start else 5), place
