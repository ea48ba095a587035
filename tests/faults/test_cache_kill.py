"""kill -9 during cache-embeddings: the next run ends with the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_cache import Slicer, draw, listed, shards, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.format import read_header
from mlxvlm.cache.writer import write_cache
from mlxvlm.errors import CacheError

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {"batch_size": 3, "shard_pictures": 5}


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A process that runs `code`, with what the tests use at hand."""
    head = f"""
        import os, signal, sys, time
        from pathlib import Path
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from tiny_cache import Slicer, listed, siglip
        from mlxvlm.cache import run, shard
        from mlxvlm.cache.index import Index
        from mlxvlm.cache.writer import write_cache
        pictures, out = listed(Path(sys.argv[1])), Path(sys.argv[2])
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        SIZES = {SIZES!r}
    """
    text = textwrap.dedent(head) + textwrap.dedent(code)
    words = [sys.executable, "-c", text, *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def survivors(folder: Path) -> dict[str, tuple[int, int]]:
    """Finished shards, in a way that shows if one is written again."""
    found = sorted((folder / "shards").glob("*.safetensors")) if folder.exists() else []
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def assert_resumes(
    encoder: Any, pictures: list, folder: Path, whole: dict[str, bytes], codec: str = "bf16"
) -> int:
    """The rest is written, nothing twice, and nothing else stays. Returns the shards kept."""
    kept = survivors(folder)
    with_index = (folder / "index.sqlite").exists()
    if kept and with_index:
        with EmbeddingCache.open(folder) as cache:  # it is a cache, as far as it goes
            assert cache.verify() == []
    finished = sum(len(read_header(folder / "shards" / name).rows) for name in kept)
    summary = write_cache(encoder, pictures, folder, codec, **SIZES)
    assert summary.encoded == len(pictures) - finished  # no finished shard's are encoded again
    assert shards(folder) == whole
    after = survivors(folder)
    assert {name: after[name] for name in kept} == kept
    assert sorted(p.name for p in folder.iterdir()) == ["cache.json", "index.sqlite", "shards"]
    with EmbeddingCache.open(folder) as cache:
        assert cache.verify() == [] and len(cache) == len(pictures)
    return len(kept)


# Where the child kills itself, and how many shards are finished then.
PLACES = {
    "in a record": ("shard.write_all = lambda fd, data: (os.write(fd, data[:9]), die())", 0),
    "before the rename": ("shard.publish = die", 0),
    "before the index": ("Index.add = die", 1),
    "in the index": (
        """
        insert = Index._insert
        def torn(self, table, *rest):
            if table == "names" and len(list((out / "shards").glob("*.safetensors"))) == 2:
                die()
            return insert(self, table, *rest)
        Index._insert = torn
        """,
        2,
    ),
}


# For the codecs that are calibrated on the first shard.
CALIBRATING = {
    **PLACES,
    "while calibrating": (
        """
        from mlxvlm.cache.whitening import Calibration
        add = Calibration.add
        def torn(self, view):
            add(self, view)
            if self.views == 4:
                die()
        Calibration.add = torn
        """,
        0,
    ),
    "when calibrated": ("shard.settled = die", 0),
}


@pytest.mark.parametrize(
    ("codec", "place"), [*(("bf16", p) for p in PLACES), *(("int8", p) for p in CALIBRATING)]
)
def test_killed_at_the_worst_moments(tmp_path, codec, place):
    pictures = draw(tmp_path / "pictures", 13)
    write_cache(Slicer(), pictures, tmp_path / "whole", codec, **SIZES)
    code, finished = CALIBRATING[place]
    process = child(
        textwrap.dedent(code) + f"\nwrite_cache(Slicer(), pictures, out, {codec!r}, **SIZES)\n",
        tmp_path / "pictures",
        tmp_path / "cache",
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    whole = shards(tmp_path / "whole")
    assert assert_resumes(Slicer(), pictures, tmp_path / "cache", whole, codec) == finished


def test_a_second_writer_meets_a_live_one_and_then_a_dead_one(tmp_path):
    pictures = draw(tmp_path / "pictures", 8)
    process = child(
        """
        def progress(_):
            print("writing", flush=True)
            time.sleep(60)
        write_cache(Slicer(), pictures, out, "bf16", progress=progress, **SIZES)
        """,
        tmp_path / "pictures",
        tmp_path / "cache",
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(CacheError, match=f"another process .pid {process.pid}.: wait"):
            write_cache(Slicer(), pictures, tmp_path / "cache", "bf16", **SIZES)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "cache" / "writer.lock").read_text() == f"{process.pid}\n"
    assert write_cache(Slicer(), pictures, tmp_path / "cache", "bf16", **SIZES).encoded == 8
    assert not (tmp_path / "cache" / "writer.lock").exists()


def test_ctrl_c_leaves_nothing_to_trip_over(tmp_path):
    pictures = draw(tmp_path / "pictures", 13)
    write_cache(Slicer(), pictures, tmp_path / "whole", "bf16", **SIZES)
    process = child(
        """
        def progress(summary):
            if summary.shards == 1:
                print("one shard", flush=True)
                time.sleep(60)
        write_cache(Slicer(), pictures, out, "bf16", progress=progress, **SIZES)
        """,
        tmp_path / "pictures",
        tmp_path / "cache",
    )
    assert process.stdout is not None and process.stdout.readline() == "one shard\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    left = {p.name for p in (tmp_path / "cache").rglob("*")}
    # What was computed before may still become a shard, and a whole one.
    assert left - {"shard-000001.safetensors"} == {
        *("cache.json", "index.sqlite", "shards", "shard-000000.safetensors")
    }
    assert_resumes(Slicer(), pictures, tmp_path / "cache", shards(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_at_thirty_random_instants(tmp_path):
    """Spread over the run by the batches done, not by the clock: how long a run takes differs by
    more than ten times on a machine that has other work."""
    encoder = siglip()
    pictures = draw(tmp_path / "pictures", 60)
    started = time.monotonic()
    write_cache(encoder, pictures, tmp_path / "whole", "bf16", **SIZES)
    batches = len(pictures) // SIZES["batch_size"]
    seconds = (time.monotonic() - started) / batches
    whole = shards(tmp_path / "whole")
    rng = random.Random(0)
    code = """
        encoder = siglip()
        print("ready", flush=True)
        report = lambda summary: print(summary.done, flush=True)
        write_cache(encoder, pictures, out, "bf16", progress=report, **SIZES)
    """
    kept = []
    for i in range(30):
        folder = tmp_path / f"cache-{i}"
        process = child(code, tmp_path / "pictures", folder)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(rng.randint(0, batches)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 2 * seconds))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        kept.append(assert_resumes(encoder, pictures, folder, whole))
    assert len(set(kept)) > 3, kept  # the instants were spread over the run


def test_an_empty_journal_goes(tmp_path):
    """SQLite makes its journal, then writes into it; killed in between, an empty one stays."""
    pictures = draw(tmp_path / "pictures", 4)
    write_cache(Slicer(), pictures, tmp_path / "cache", "bf16", **SIZES)
    (tmp_path / "cache" / "index.sqlite-journal").touch()
    assert_resumes(Slicer(), pictures, tmp_path / "cache", shards(tmp_path / "cache"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_only_be_read(tmp_path):
    pictures = draw(tmp_path / "pictures", 8)
    write_cache(Slicer(), pictures, tmp_path / "cache", "bf16", **SIZES)
    (tmp_path / "cache" / "index.sqlite").unlink()
    (tmp_path / "cache").chmod(0o500)
    try:
        with EmbeddingCache.open(tmp_path / "cache") as cache:
            assert len(cache) == 8 and cache.verify() == []
    finally:
        (tmp_path / "cache").chmod(0o700)
    assert listed(tmp_path / "pictures") == pictures
