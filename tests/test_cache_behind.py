"""Writing goes on behind the encoder, in order, and stops at its first error."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from tiny_cache import Slicer, draw, shards

from mlxvlm.cache.behind import Behind
from mlxvlm.cache.shard import ShardWriter
from mlxvlm.cache.writer import write_cache


def test_acts_are_done_in_order():
    done: list[int] = []
    behind = Behind()
    for i in range(50):
        behind.do(lambda i=i: done.append(i))
    behind.wait()
    behind.close()
    assert done == list(range(50))


def test_nothing_is_done_after_an_error():
    done: list[int] = []
    gate = threading.Event()

    def fail() -> None:
        gate.wait(10)
        raise ZeroDivisionError

    behind = Behind(depth=4)
    behind.do(lambda: done.append(0))
    behind.do(fail)
    behind.do(lambda: done.append(1))
    gate.set()
    with pytest.raises(ZeroDivisionError):
        behind.wait()
    behind.close()
    assert done == [0]


def test_who_hands_over_waits_for_the_depth_and_no_less():
    gate = threading.Event()
    behind = Behind(depth=2)
    behind.do(lambda: gate.wait(10) and None)
    behind.do(lambda: None)
    waited = threading.Thread(target=lambda: behind.do(lambda: None))
    waited.start()
    time.sleep(0.05)
    assert waited.is_alive()
    gate.set()
    waited.join(10)
    behind.wait()
    behind.close()


def test_the_encoder_goes_on_while_a_batch_is_written(tmp_path: Path, monkeypatch):
    encoder = Slicer()
    add = ShardWriter.add
    met: list[bool] = []

    def slow(self: ShardWriter, *arguments: object) -> int:
        end = time.monotonic() + 10
        while not met and len(encoder.batches) < 4 and time.monotonic() < end:
            time.sleep(0.001)
        met.append(len(encoder.batches) >= 4)
        return add(self, *arguments)  # type: ignore[arg-type]

    pictures = draw(tmp_path / "pictures", 12)
    write_cache(Slicer(), pictures, tmp_path / "plain", batch_size=2, shard_pictures=12)
    monkeypatch.setattr(ShardWriter, "add", slow)
    write_cache(encoder, pictures, tmp_path / "cache", batch_size=2, shard_pictures=12)
    assert met[0], "the encoder stood still while the first batch was written"
    assert shards(tmp_path / "cache") == shards(tmp_path / "plain")


def test_a_shard_that_lacks_a_batch_is_never_published(tmp_path: Path, monkeypatch):
    pictures = draw(tmp_path / "pictures", 12)
    add = ShardWriter.add
    added: list[int] = []

    def full(self: ShardWriter, *arguments: object) -> int:
        added.append(0)
        if len(added) == 7:
            raise OSError(5, "input/output error")
        return add(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="input/output"):
        write_cache(Slicer(), pictures, tmp_path / "cache", batch_size=1, shard_pictures=4)
    assert list(shards(tmp_path / "cache")) == ["shard-000000.safetensors"]
    assert len(added) == 7
    monkeypatch.undo()
    write_cache(Slicer(), pictures, tmp_path / "plain", batch_size=1, shard_pictures=4)
    write_cache(Slicer(), pictures, tmp_path / "cache")
    assert shards(tmp_path / "cache") == shards(tmp_path / "plain")
