"""How long a caching run takes beside its two halves, and how often its encoder has nothing to do.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/cache_idle.py \\
        [--pictures 400] [--layers 4] [--image-size 384] [--codec bf16] [--workers 2]

An encoder with layers of So400m's shape, on JPEGs of 640 x 480. Goals: wall at most 1.05 times its
bound; the encoder idle for less than 5% of it where encoding is the longer half. The bound is the
longest of encoding alone, decoding alone, and the processor time of both over the cores: a machine
whose cores decode has none left to encode on. Idle time is the kernel's count for the thread that
computes: neither running nor waiting for a core (Linux), so that other load on the machine does not
pass for it. A small --image-size makes decoding the longer half. `ours` is the processor time of
caching beyond that of its halves: hashing twice, quantising, writing, the index.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
import numpy as np
from PIL import Image

from mlxvlm.cache.jobs import distinct
from mlxvlm.cache.loader import Loader
from mlxvlm.cache.writer import write_cache
from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder


def draw(folder: Path, count: int) -> list[tuple[str, Path]]:
    """JPEGs as large as those of LLaVA's data: soft shapes with some grain, about 80 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        path = folder / f"{i:04}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        found.append((path.name, path))
    return found


def threads() -> dict[int, tuple[float, float]]:
    """Seconds on a core, and waiting for one, of each thread of this process."""
    found = {}
    try:
        for name in os.listdir("/proc/self/task"):
            run, wait, _ = Path(f"/proc/self/task/{name}/schedstat").read_text().split()
            found[int(name)] = (int(run) / 1e9, int(wait) / 1e9)
    except OSError:
        pass
    return found


class Spent(NamedTuple):
    """Seconds by the clock, and of processors."""

    wall: float
    cpu: float

    @classmethod
    def until(cls, started: Spent) -> Spent:
        return cls(time.perf_counter() - started.wall, time.process_time() - started.cpu)

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())


def encode_alone(encoder: Any, pictures: list[Any], batch_size: int) -> Spent:
    """For pictures that are at hand, two batches on their way at a time."""
    started = Spent.now()
    waiting: list[Any] = []
    for start in range(0, len(pictures), batch_size):
        views = [f.views[0] for f in encoder.encode(pictures[start : start + batch_size])]
        mx.async_eval(views)
        waiting.append(views)
        if len(waiting) == 2:
            mx.eval(waiting.pop(0))
    mx.eval(waiting)
    return Spent.until(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--codec", default="bf16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    config = VisionConfig(num_hidden_layers=options.layers, image_size=options.image_size)
    tiling = TilingConfig(image_size=options.image_size)
    mx.random.seed(0)
    encoder = Encoder(build_vision(config), config, tiling, dtype=getattr(mx, options.dtype))
    encoder.identity()  # the digest of the weights takes a second, once
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = draw(folder / "pictures", options.pictures)
        loader = Loader(encoder, lambda *content: False, options.workers, 2 * options.batch_size)
        started = Spent.now()
        pictures = [one.picture for one in loader.load(distinct(jobs))]
        decoding = Spent.until(started)
        loader.close()
        assert all(pictures)
        encode_alone(encoder, pictures[:1], 1)  # to warm up
        before = encode_alone(encoder, pictures, options.batch_size)
        marks = threads()
        started = Spent.now()
        summary = write_cache(
            encoder,
            jobs,
            folder / "cache",
            options.codec,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        caching = Spent.until(started)
        spent = [(b[0] - a[0], b[1] - a[1]) for t, b in threads().items() if (a := marks.get(t))]
        after = encode_alone(encoder, pictures, options.batch_size)
    assert summary.encoded == options.pictures and not summary.failures
    # Of a machine that is shared, before and after.
    encoding = Spent((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    together = (encoding.cpu + decoding.cpu) / (cores or 1)
    bound = max(encoding.wall, decoding.wall, together)
    each = 1000 / options.pictures
    print(f"pictures {options.pictures}, layers {options.layers}, {options.codec}")
    print(f"decoding alone   {decoding.wall:8.2f} s, {decoding.cpu:.2f} s of processors")
    print(
        f"encoding alone   {encoding.wall:8.2f} s, {encoding.cpu:.2f} s of processors "
        f"({before.wall:.2f} before, {after.wall:.2f} after)"
    )
    print(f"both on {cores} cores {together:8.2f} s")
    print(
        f"caching          {caching.wall:8.2f} s, {caching.cpu:.2f} s of processors, "
        f"{summary.bytes / 1e6:.0f} MB"
    )
    ours = caching.cpu - encoding.cpu - decoding.cpu
    print(f"ours             {ours:8.2f} s of processors, {ours * each:.2f} ms a picture")
    print(f"wall / the longer half: {caching.wall / max(encoding.wall, decoding.wall):.3f}")
    print(f"wall / bound: {caching.wall / bound:.3f} (goal: 1.05)")
    if spent:
        run, wait = max(spent)
        idle = 1 - (run + wait) / caching.wall
        print(f"encoder: {run:.2f} s on a core, {wait:.2f} s waiting for one, idle {idle:.1%} (5%)")
    print(f"load {' '.join(f'{x:.1f}' for x in os.getloadavg())} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
