"""How long a training step waits for features.

    python tests/benchmarks/cache_feed.py [--pictures 64]

A small language model and an MLP projector learn from cached features of So400m's size, 729 x 1152.
`wait` is the time between asking for a batch and having it; `read` is what the reading thread takes
for one, so that a step of that length or more never waits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny_cache import draw
from tiny_vlm import tiny_vlm

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.writer import write_cache
from mlxvlm.data.batching import Batching
from mlxvlm.data.feed import Feed, Pictures
from mlxvlm.data.records import parse_record
from mlxvlm.data.samples import prepare
from mlxvlm.images.picture import Features, Picture
from mlxvlm.projectors.mlp import MLPProjector
from mlxvlm.train.losses import batch_loss, count

TOKENS, WIDTH = 729, 1152


class Noise:
    """Stands for an encoder: features with a few strong channels, as trained towers have them."""

    def look(self, images: list[bytes]) -> list[Picture]:
        return [Picture([np.zeros((4, 4, 3), np.uint8)]) for _ in images]

    def encode(self, pictures: list[Picture]) -> list[Features]:
        scale = mx.where(mx.arange(WIDTH) % 97 == 0, 30.0, 1.0)
        return [Features([mx.random.normal((TOKENS, WIDTH)) * scale]) for _ in pictures]

    def identity(self) -> dict[str, Any]:
        return {"model_type": "noise"}


def measure(codec: str, folder: Path, args: argparse.Namespace) -> str:
    from unittest.mock import patch

    pictures = draw(folder / "pictures", args.pictures)
    write_cache(Noise(), pictures, folder / codec, codec)
    vlm = tiny_vlm()
    with patch.object(type(vlm.config), "tokens_per_view", TOKENS):
        vlm.config.vision.hidden_size = WIDTH
        language = vlm.config.language["hidden_size"]
        vlm.projector = MLPProjector(vlm.config.projector, WIDTH, language, 27)
        vlm.freeze()
        vlm.projector.unfreeze()
        with EmbeddingCache.open(folder / codec) as cache:
            source = Pictures(None, folder, cache)
            rows = [{"image": name, "text": "a caption of a few words"} for name, _ in pictures]
            records = [(str(i), parse_record(row, str(i))) for i, row in enumerate(rows)]
            samples, skipped = prepare(records, vlm.tokenizer, vlm.config, source.cut, 4096)
            assert not skipped, skipped[0]
            feed = Feed(samples, source, Batching(args.batch_size))
            started = time.perf_counter()
            for i, (indices, _) in enumerate(feed.order(0)):
                feed.fetch(indices)
                if i + 1 == args.steps:
                    break
            read = (time.perf_counter() - started) / args.steps
            step = nn.value_and_grad(vlm, batch_loss)
            reading = feed.read()
            waits, steps = [], []
            for _ in range(args.steps + 2):
                started = time.perf_counter()
                batch, found = next(reading)
                got = time.perf_counter()
                assert batch is not None
                mx.eval(step(vlm, batch, source.views(found), {}, count([batch])))
                waits.append(got - started)
                steps.append(time.perf_counter() - started)
            reading.close()
    waits, steps = waits[2:], steps[2:]  # the first two start reading
    return (
        f"{codec:8} step {np.mean(steps) * 1e3:7.1f} ms  wait {np.mean(waits) * 1e3:6.3f} ms "
        f"({100 * sum(waits) / sum(steps):.2f}%, at most {max(waits) * 1e3:.3f} ms)  "
        f"read {read * 1e3:6.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    for codec in ("float32", "bf16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(codec, Path(folder), args), flush=True)


if __name__ == "__main__":
    main()
