"""How long a caching run takes beside its two halves, and how often its encoder has nothing to do.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/cache_idle.py \\
        [--pictures 400] [--layers 4] [--image-size 384] [--codec bf16] [--workers 2]

An encoder with layers of So400m's shape, on JPEGs of 640 x 480. Goals: wall at most 1.05 times the
longer of encoding alone and decoding alone; the encoder idle for less than 5% of it. Idle time is
the kernel's count for the thread that computes: neither running nor waiting for a core (Linux), so
that other load on the machine does not pass for it. A small --image-size makes decoding the longer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def encode_alone(encoder: Any, pictures: list[Any], batch_size: int) -> float:
    """Seconds for pictures that are at hand, two batches on their way at a time."""
    started = time.perf_counter()
    waiting: list[Any] = []
    for start in range(0, len(pictures), batch_size):
        views = [f.views[0] for f in encoder.encode(pictures[start : start + batch_size])]
        mx.async_eval(views)
        waiting.append(views)
        if len(waiting) == 2:
            mx.eval(waiting.pop(0))
    mx.eval(waiting)
    return time.perf_counter() - started


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
        started = time.perf_counter()
        pictures = [one.picture for one in loader.load(distinct(jobs))]
        decoding = time.perf_counter() - started
        loader.close()
        assert all(pictures)
        encode_alone(encoder, pictures[:1], 1)  # to warm up
        before = encode_alone(encoder, pictures, options.batch_size)
        marks = threads()
        started = time.perf_counter()
        summary = write_cache(
            encoder,
            jobs,
            folder / "cache",
            options.codec,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        wall = time.perf_counter() - started
        spent = [(b[0] - a[0], b[1] - a[1]) for t, b in threads().items() if (a := marks.get(t))]
        after = encode_alone(encoder, pictures, options.batch_size)
    assert summary.encoded == options.pictures and not summary.failures
    encoding = (before + after) / 2  # of a machine that is shared, before and after
    print(f"pictures {options.pictures}, layers {options.layers}, {options.codec}")
    print(f"decoding alone   {decoding:8.2f} s ({options.workers} threads)")
    print(f"encoding alone   {encoding:8.2f} s ({before:.2f} before, {after:.2f} after)")
    print(f"caching          {wall:8.2f} s, {summary.bytes / 1e6:.0f} MB")
    print(f"wall / the longer of the two: {wall / max(encoding, decoding):.3f} (goal: 1.05)")
    if spent:
        run, wait = max(spent)
        idle = 1 - (run + wait) / wall
        print(f"encoder: {run:.2f} s on a core, {wait:.2f} s waiting for one, idle {idle:.1%} (5%)")
    print(f"load {' '.join(f'{x:.1f}' for x in os.getloadavg())} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
