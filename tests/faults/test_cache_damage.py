"""Bits that flip, disks that fill up, and what is refused: never a wrong row."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from test_cache_kill import SIZES, child
from tiny_cache import VISION, Slicer, draw, shards, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import read_header
from mlxvlm.cache.writer import write_cache
from mlxvlm.config import TilingConfig
from mlxvlm.errors import CacheError
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder

Named = list[tuple[str, Path]]
Rows = dict[str, list[bytes]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def flip(path: Path, data: bytes, place: int, bit: int) -> None:
    """`data` with one bit flipped, as a bad disk does it: neither size nor time tell."""
    state = path.stat()
    flipped = bytearray(data)
    flipped[place] ^= 1 << bit
    with open(path, "r+b") as file:
        file.write(flipped)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def rows(folder: Path) -> Rows:
    with EmbeddingCache.open(folder) as cache:
        return {name: [v.tobytes() for v in cache[name].views] for name in cache.names()}


def read(folder: Path, expected: Rows) -> int:
    """Reads every row; each is right, or an error of ours. Returns the number of errors."""
    errors = 0
    with EmbeddingCache.open(folder) as cache:
        for name, views in expected.items():
            try:
                found = [view.tobytes() for view in cache[name].views]
            except CacheError:
                errors += 1
                continue
            assert found == views, name
    return errors


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_two_hundred_flips_in_shards(tmp_path, codec):
    folder = tmp_path / "cache"
    write_cache(siglip(), draw(tmp_path / "pictures", 13), folder, codec, **SIZES)
    expected = rows(folder)
    files = sorted((folder / "shards").iterdir())
    starts = [read_header(path).start for path in files]
    rng = np.random.default_rng(0)
    index = (folder / "index.sqlite").read_bytes()
    for i in range(100):
        which = int(rng.integers(len(files)))
        path, start = files[which], starts[which]
        sound = path.read_bytes()
        # Half of them in headers, which are small here and hold everything else.
        place = int(rng.integers(0, start) if i % 2 else rng.integers(start, len(sound)))
        flip(path, sound, place, int(rng.integers(8)))
        try:
            with EmbeddingCache.open(folder) as cache:
                problems = cache.verify()
            assert any(path.name == problem.shard for problem in problems), place
            errors = read(folder, expected)
            assert errors == 1 if place >= start else errors in (0, 3, 5), (place, errors)
            if i % 10 == 1:  # found by a new index too
                (folder / "index.sqlite").unlink()
                assert read(folder, expected) == (3 if which == 2 else 5)
                (folder / "index.sqlite").write_bytes(index)
        finally:
            state = path.stat()
            path.write_bytes(sound)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert read(folder, expected) == 0


def test_flips_in_the_index_never_give_a_wrong_row(tmp_path):
    folder = tmp_path / "cache"
    write_cache(Slicer(), draw(tmp_path / "pictures", 13), folder, **SIZES)
    expected = rows(folder)
    index = folder / "index.sqlite"
    sound = index.read_bytes()
    used = [i for i in range(len(sound)) if sound[i]]
    rng = np.random.default_rng(0)
    for _ in range(100):
        flip(index, sound, int(rng.choice(used)), int(rng.integers(8)))
        assert read(folder, expected) == 0  # noticed, and made again from the shards
        index.write_bytes(sound)
    for journal in (b"", b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(600), os.urandom(4096)):
        (folder / "index.sqlite-journal").write_bytes(journal)
        assert read(folder, expected) == 0
        (folder / "index.sqlite-journal").unlink(missing_ok=True)
        index.write_bytes(sound)


def test_flips_in_cache_json_are_noticed_or_mean_nothing(tmp_path):
    folder = tmp_path / "cache"
    encoder = siglip()
    write_cache(encoder, draw(tmp_path / "pictures", 8), folder, **SIZES)
    expected = rows(folder)
    path = folder / "cache.json"
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(150):
        flip(path, sound, int(rng.integers(len(sound))), int(rng.integers(8)))
        for rebuilt in (False, True):
            if rebuilt:
                (folder / "index.sqlite").unlink(missing_ok=True)
            try:
                assert read(folder, expected) == 0
                with EmbeddingCache.open(folder) as cache:
                    cache.require(encoder.identity())
            except CacheError:
                noticed += 1
        path.write_bytes(sound)
    assert noticed > 100


# A full disk


@pytest.mark.parametrize("limit", [20_000, 40_000, 70_000])
def test_a_real_limit_stops_a_run_with_the_bytes_needed(tmp_path, limit):
    """No file may grow past `limit` bytes: writes fail inside a record, a header, the index."""
    pictures = draw(tmp_path / "pictures", 60)
    sizes = {"batch_size": 3, "shard_pictures": 20}
    write_cache(Slicer(), pictures, tmp_path / "whole", "float32", **sizes)
    whole = shards(tmp_path / "whole")
    process = child(
        f"""
        import resource
        from mlxvlm.errors import CacheError
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))
        try:
            write_cache(Slicer(), pictures, out, "float32", batch_size=3, shard_pictures=20)
        except CacheError as error:
            print(error)
        """,
        tmp_path / "pictures",
        tmp_path / "cache",
    )
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert re.search(r"is full: (about \S+ (bytes|kB|MB)|more bytes) are needed", told), told
    folder = tmp_path / "cache"
    assert sorted(p.name for p in (folder / "shards").iterdir()) == [
        name for name in whole if (folder / "shards" / name).exists()
    ]
    with EmbeddingCache.open(folder) as cache:
        assert cache.verify() == []
    write_cache(Slicer(), pictures, folder, "float32", **sizes)
    assert shards(folder) == whole
    assert sorted(p.name for p in folder.iterdir()) == ["cache.json", "index.sqlite", "shards"]


@pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="needs to mount a disk"
)
def test_a_small_disk_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        pictures = draw(tmp_path / "pictures", 100)
        write_cache(Slicer(), pictures, tmp_path / "whole", "float32", **SIZES)
        whole = shards(tmp_path / "whole")
        assert sum(len(data) for data in whole.values()) > 300_000
        with pytest.raises(CacheError, match=r"is full: about [\d.]+ [kM]B are needed"):
            write_cache(Slicer(), pictures, disk / "cache", "float32", **SIZES)
        kept = shards(disk / "cache")
        assert kept and kept == {name: whole[name] for name in kept}
        with EmbeddingCache.open(disk / "cache") as cache:
            assert cache.verify() == [] and len(cache) == 5 * len(kept)
        shutil.copytree(disk / "cache", tmp_path / "roomy")
        encoder = Slicer()
        write_cache(encoder, pictures, tmp_path / "roomy", "float32", **SIZES)
        assert shards(tmp_path / "roomy") == whole
        assert sum(encoder.batches) == len(pictures) - 5 * len(kept)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# What is refused


def changed(**options: Any) -> Callable[[], Encoder]:
    """The tiny SigLIP with other fields; its weights are those of the seed."""

    def make() -> Encoder:
        from dataclasses import replace

        vision = {k: v for k, v in options.items() if hasattr(VISION, k)}
        tiling = {k.removeprefix("tiling_"): v for k, v in options.items() if k[:7] == "tiling_"}
        config = replace(VISION, **vision)
        mx.random.seed(0)
        others = {k: v for k, v in options.items() if k in ("dtype", "pool")}
        tiles = TilingConfig(**{"image_size": config.image_size, **tiling})
        return Encoder(build_vision(config), config, tiles, **others)

    return make


def one_bit() -> Encoder:
    encoder = siglip()
    flat = dict(tree_flatten(encoder.vision.parameters()))
    name = "encoder.layers.1.mlp.fc2.weight"
    bits = np.array(flat[name].view(mx.uint32))
    bits[3, 5] ^= 1
    flat[name] = mx.array(bits).view(mx.float32)
    encoder.vision.update(tree_unflatten(list(flat.items())))
    return encoder


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (one_bit, "sha256"),
        (changed(vision_feature_layer=-2), "vision_feature_layer"),
        (changed(vision_feature_norm=False), "vision_feature_norm"),
        (changed(image_size=40), "image_size"),
        (changed(image_mean=(0.5, 0.5, 0.5000001)), "image_mean"),
        (changed(image_std=(0.5, 0.5, 0.4999999)), "image_std"),
        (changed(layer_norm_eps=1.0000001e-6), "layer_norm_eps"),
        (changed(hidden_act="gelu"), "hidden_act"),
        (changed(vision_feature_select_strategy="default"), "vision_feature_select_strategy"),
        (changed(tiling_resize="pad"), r"tiling\.resize"),
        (changed(tiling_resample="bilinear"), r"tiling\.resample"),
        (changed(tiling_background=(127, 127, 128)), r"tiling\.background"),
        (changed(dtype=mx.bfloat16), "dtype"),
        (changed(pool="mean2"), "pool"),
    ],
)
def test_the_least_change_of_the_encoder_is_refused(tmp_path, make, field):
    pictures = draw(tmp_path / "pictures", 2)
    write_cache(siglip(), pictures, tmp_path / "cache")
    other = make()
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        cache.require(siglip().identity())
        with pytest.raises(CacheError, match=rf"differ in .*\b{field} \("):
            cache.require(other.identity())
    with pytest.raises(CacheError, match=rf"encoder\.{field} \("):
        write_cache(other, pictures, tmp_path / "cache")


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_format_version_is_refused(tmp_path, version):
    pictures = draw(tmp_path / "pictures", 2)
    write_cache(Slicer(), pictures, tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))
    for act in (
        lambda: EmbeddingCache.open(tmp_path / "cache"),
        lambda: write_cache(Slicer(), pictures, tmp_path / "cache"),
    ):
        with pytest.raises(CacheError, match="format_version must be 1"):
            act()


# kill -9 while a cache is looked after

UPKEEP = {
    "prune, before the rename": "rewrite.publish = die\nprune_cache(out, names)",
    "prune, after one shard": (
        "real = rewrite.publish\n"
        "def publish(*args):\n    real(*args)\n    die()\n"
        "rewrite.publish = publish\nprune_cache(out, names)"
    ),
    "merge, after one shard": ("Index.add = die\nmerge_caches(out.with_name('joined'), [out])"),
    "merge, in a copy": (
        "import errno\n"
        "def publish(*args):\n    raise OSError(errno.EXDEV, 'another disk')\n"
        "merge.publish, merge.sync = publish, die\nmerge_caches(out.with_name('joined'), [out])"
    ),
    "repair, before the rename": "rewrite.publish = die\nrepair_cache(Slicer(), out, source)",
    "repair, before a damaged shard goes": (
        "Path.unlink = lambda path, missing_ok=False: (\n"
        "    die() if path.name.startswith('shard-') else None)\n"
        "repair_cache(Slicer(), out, source)"
    ),
}


@pytest.mark.parametrize("place", UPKEEP)
def test_killed_while_a_cache_is_looked_after(tmp_path, place):
    from mlxvlm.cache.merge import merge_caches
    from mlxvlm.cache.prune import prune_cache
    from mlxvlm.cache.repair import repair_cache

    pictures = draw(tmp_path / "pictures", 13)
    folder = tmp_path / "cache"
    write_cache(Slicer(), pictures, folder, **SIZES)
    expected = rows(folder)
    dropped = ("001.png", "006.png", "011.png")
    names = [(name, 1) for name, _ in pictures if name not in dropped]
    if "repair" in place:
        path = sorted((folder / "shards").iterdir())[1]
        sound = path.read_bytes()
        flip(path, sound, 100 if "damaged shard" in place else len(sound) - 1, 0)
    process = child(
        "from mlxvlm.cache import merge, rewrite\n"
        "from mlxvlm.cache.merge import merge_caches\n"
        "from mlxvlm.cache.prune import prune_cache\n"
        "from mlxvlm.cache.repair import repair_cache\n"
        f"names, source = {names!r}, Path(sys.argv[1])\n{UPKEEP[place]}\n",
        tmp_path / "pictures",
        folder,
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -9, errors
    if "merge" in place:
        merge_caches(tmp_path / "joined", [folder])
        folder = tmp_path / "joined"
    elif "prune" in place:
        expected = {name: expected[name] for name, _ in names}
        assert read(folder, expected) == 0
        prune_cache(folder, names)
    else:
        assert repair_cache(Slicer(), folder, tmp_path / "pictures").left == []
    assert rows(folder) == expected
    with EmbeddingCache.open(folder) as cache:
        assert cache.verify() == []
    assert sorted(p.name for p in folder.iterdir()) == ["cache.json", "index.sqlite", "shards"]
    assert not [p for p in folder.rglob("*") if p.name.endswith((".partial", "-journal"))]
