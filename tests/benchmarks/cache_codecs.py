"""The cache's figures: what codecs cost and give, and what a read costs.

    python tests/benchmarks/cache_codecs.py                    # synthetic features only
    python tests/benchmarks/cache_codecs.py --encoder weights/demo --images DIR  # a tower's too

rel.err   RMS error over the RMS of the features
worst     the worst channel's RMS error over that channel's standard deviation
enc, dec  views a second of one core's CPU time (NumPy; MLX's own modes on its CPU backend)
mx ms     CPU milliseconds from a record in memory to a decoded mx.array

int8 and int4 are calibrated on the first half of the views; errors are those of the second half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.codecs import CODECS, codec_named, record_size, settled
from mlxvlm.cache.packed import unpack
from mlxvlm.cache.whitening import Calibration
from mlxvlm.cache.writer import write_cache
from mlxvlm.images.picture import Features, Picture

SO400M = (729, 1152)
# MLX's own: name -> what mx.quantize takes.
MODES: dict[str, dict[str, Any]] = {
    "mx 8-bit": {"group_size": 64, "bits": 8},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "mx 4-bit": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def outliers(views: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """[views, tokens, width]: correlated tokens with heavy-tailed noise; channels whose sizes are
    log-normal, six of them 12 to 40 times larger, all off zero; one token in a hundred is loud."""
    rng = np.random.default_rng(seed)
    tokens, width = shape
    sizes = np.exp(rng.standard_normal(width))
    sizes[rng.choice(width, 6, replace=False)] *= rng.uniform(12, 40, 6)
    basis = (rng.standard_normal((64, width)) / 8).astype(np.float32)
    means = rng.standard_normal(width)
    out = np.empty((views, tokens, width), np.float32)
    for view in out:
        x = 0.8 * rng.standard_normal((tokens, 64), dtype=np.float32) @ basis
        x += 0.45 * rng.standard_t(5, (tokens, width))
        x[rng.random(tokens) < 0.01] *= 5
        view[:] = (x + means) * sizes
    return out


def of_encoder(folder: Path, images: Path, count: int) -> np.ndarray:
    """[views, tokens, width] of `count` pictures spread over a folder."""
    from mlxvlm.data.sources import list_pictures
    from mlxvlm.weights.load import load_encoder

    encoder = load_encoder(str(folder))
    found = list_pictures(images)
    chosen = [found[i * len(found) // count] for i in range(min(count, len(found)))]
    views = []
    for i in range(0, len(chosen), 16):
        features = encoder.encode(encoder.look(chosen[i : i + 16]))
        views += [np.array(v.astype(mx.float32)) for one in features for v in one.views]
    return np.stack(views)


def seconds(act: Callable[[], Any], times: int = 12) -> float:
    """CPU seconds of the quickest of `times`."""
    found = []
    for _ in range(times):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return max(min(found), 1e-9)


def errors(true: np.ndarray, found: Iterator[np.ndarray]) -> tuple[float, float, float]:
    """(relative error, worst channel, 1 - mean cosine of the tokens) over views, one at a time."""
    squares, power, cosines = np.zeros(true.shape[2]), 0.0, []
    for view, other in zip(true, found, strict=True):
        view = view.astype(np.float64)
        squares += ((other - view) ** 2).sum(axis=0)
        power += float((view**2).sum())
        dots = (view * other).sum(axis=1)
        norms = np.linalg.norm(view, axis=1) * np.linalg.norm(other.astype(np.float64), axis=1)
        cosines.append((dots / norms).mean())
    deviation = true.reshape(-1, true.shape[2]).std(axis=0, dtype=np.float64)
    worst = np.sqrt(squares / (true.shape[0] * true.shape[1])) / np.maximum(deviation, 1e-30)
    return np.sqrt(squares.sum() / power), worst.max(), 1 - np.mean(cosines)


def table(title: str, views: np.ndarray) -> None:
    half = len(views) // 2
    calibration = Calibration()
    for view in views[:half]:
        calibration.add(view)
    whitening, true = calibration.whitening(), views[half:]
    shape = true.shape[1:]
    print(f"\n{title}: {half} views calibrate, {len(true)} tested, {shape[0]}x{shape[1]}")
    print("codec     bytes/view  of bf16  rel.err    worst   1-cos     enc/s   dec/s  mx ms")
    for name in CODECS:
        codec = settled(codec_named(name), whitening)

        def stored(view: np.ndarray, codec: Any = codec) -> bytes:
            return codec.encode(view).reshape(-1).view(np.uint8).tobytes()

        record = stored(true[0])
        size = record_size(codec, shape)
        codec.encode(true[0])
        row(
            name,
            size,
            shape,
            errors(true, (codec.decode(stored(view), shape) for view in true)),
            seconds(lambda codec=codec: codec.encode(true[0])),
            seconds(lambda codec=codec, record=record: codec.decode(record, shape)),
            seconds(lambda codec=codec, record=record: mx.eval(codec.unpack([record], shape))),
        )
    for name, options in MODES.items():
        parts: Any = mx.quantize(mx.array(true[0]), **options)
        mx.eval(parts)

        def there(view: np.ndarray, options: dict[str, Any] = options) -> Any:
            parts = mx.quantize(mx.array(view), **options)
            mx.eval(parts)
            return parts

        def back(parts: Any, options: dict[str, Any] = options) -> np.ndarray:
            return np.array(mx.dequantize(*parts, **options).astype(mx.float32))

        row(
            name,
            sum(part.nbytes for part in parts),
            shape,
            errors(true, (back(there(view)) for view in true)),
            seconds(lambda there=there: there(true[0]), 4),
            seconds(lambda back=back, parts=parts: back(parts), 4),
            None,
        )


def row(
    name: str,
    size: int,
    shape: tuple[int, ...],
    error: tuple[float, float, float],
    encode: float,
    decode: float,
    device: float | None,
) -> None:
    relative, worst, cosine = error
    print(
        f"{name:9} {size:10,}  {size / (2 * shape[0] * shape[1]):6.1%}  {relative:8.3%} "
        f"{worst:8.3%}  {cosine:.1e}  {1 / encode:7,.0f} {1 / decode:7,.0f}  "
        f"{'' if device is None else f'{1e3 * device:5.2f}'}",
        flush=True,
    )


class Given:
    """An encoder of nothing: it hands out views made beforehand, by the number in the file."""

    def __init__(self, views: np.ndarray):
        self.views = views

    def look(self, images: list[bytes]) -> list[Picture]:
        return [Picture([np.full((1, 1, 3), int(data), np.uint8)]) for data in images]

    def encode(self, pictures: list[Picture]) -> list[Features]:
        return [Features([mx.array(self.views[p.views[0][0, 0, 0]])]) for p in pictures]

    def identity(self) -> dict[str, Any]:
        return {"model_type": "given"}


def reading(views: np.ndarray, codecs: list[str]) -> None:
    """CPU and wall time of a read in random order, warm: each checks its record's crc32.

    packed: the record in memory. shipped: its bytes in mx.arrays and the decoding asked for, which
    is all that the CPU does where MLX computes on a GPU. decoded: by MLX here, evaluated.
    """
    print(f"\nreading {len(views)} views {views.shape[1]}x{views.shape[2]} at random, warm")
    print("CPU ms (wall)  of bf16  packed         shipped        decoded        NumPy float32")
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for i in range(len(views)):
            path = Path(folder) / f"{i}.txt"
            path.write_text(str(i))
            sources.append((path.name, path))
        for name in codecs:
            out = Path(folder) / name
            write_cache(Given(views), sources, out, name)
            total = sum(path.stat().st_size for path in (out / "shards").iterdir())
            order = np.random.default_rng(0).permutation(len(views)).tolist() * 2
            with EmbeddingCache.open(out) as cache:
                mx.eval(unpack([cache.packed("0.txt")]))
                cells = []
                for act in (
                    lambda key, cache=cache: cache.packed(key),
                    lambda key, cache=cache: unpack([cache.packed(key)]),
                    lambda key, cache=cache: mx.eval(unpack([cache.packed(key)])),
                    lambda key, cache=cache: cache[key],
                ):
                    cpu, wall = time.process_time(), time.perf_counter()
                    for i in order:
                        act(sources[i][0])
                    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                    cells.append(
                        f"{1e3 * cpu / len(order):.2f} ({1e3 * wall / len(order):.2f})".ljust(13)
                    )
            print(f"{name:14} {total / (2 * views.size):7.2%}  {'  '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the embedding cache.")
    parser.add_argument("--encoder", type=Path, help="a trained tower, or a model with one")
    parser.add_argument("--images", type=Path, help="pictures for --encoder")
    parser.add_argument("--pictures", type=int, default=1024, help="how many of them")
    parser.add_argument("--views", type=int, default=32, help="synthetic views of 729x1152")
    args = parser.parse_args()
    print(f"mlx {mx.__version__}, {mx.default_device()}, numpy {np.__version__}")
    if args.encoder:
        table(f"features of {args.encoder}", of_encoder(args.encoder, args.images, args.pictures))
    views = outliers(args.views, SO400M)
    table("synthetic, with outliers", views)
    reading(views, ["bf16", "int8", "int4"])


if __name__ == "__main__":
    main()
