"""What a codec costs the model: the same training on float32 features and on others.

    python tests/benchmarks/cache_study.py --model DIR --images DIR --data ROWS --val ROWS

For each seed: a fresh projector, trained before MODEL's frozen language model on the features of
each codec, in one order of the data. Validation is on float32 features, which a model meets when
it is used, and on the codec's own. A pair differs by the codec alone; the table shows the mean of
the pairs' relative differences with its 95% interval (Student's t). bf16 is there to show what
rounding of any kind does to one run: a codec within its interval cannot be told from float32.
The learning rate is low on purpose: at 2e-3 two runs that differ by bf16's rounding alone end 14%
apart, in whichever direction, and nothing can be told from three seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.writer import write_cache
from mlxvlm.data.feed import Pictures
from mlxvlm.language.load import language_width
from mlxvlm.projectors.build import build_projector
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config
from mlxvlm.weights.load import load, load_encoder
from mlxvlm.weights.save import save

# Student's t, two-sided 95%, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262}


def rows_of(path: Path, pictures: int, to: Path) -> list[str]:
    """Copies the rows of the first `pictures` pictures without targets; returns their names."""
    names: dict[str, None] = {}
    with open(path, encoding="utf-8") as file, open(to, "w", encoding="utf-8") as out:
        for line in file:
            row = json.loads(line)
            if row["image"] not in names and len(names) == pictures:
                continue  # rows of one picture may lie apart
            names[row["image"]] = None
            row.pop("targets", None)
            out.write(json.dumps(row) + "\n")
    return list(names)


def fresh(model: Path, seed: int, to: Path) -> None:
    """The model with a new projector."""
    vlm = load(model)
    mx.random.seed(seed)
    config = vlm.config
    vlm.projector = build_projector(
        config.projector, config.vision, language_width(config.language)
    )
    mx.eval(vlm.parameters())
    save(vlm, to)


def train(args: argparse.Namespace, work: Path, codec: str, seed: int) -> dict[str, float]:
    config = stage_config(
        "pretrain",
        {
            "model": str(work / f"model-{seed}"),
            "data": str(work / "train.jsonl"),
            "val_data": str(work / "val.jsonl"),
            "images": str(args.images),
            "cache": str(work / codec),
            "out": str(work / f"run-{codec}-{seed}"),
            "train": args.train,
            "iters": args.iters,
            "batch_size": 8,
            "share_prefix": 8,
            "length_multiple": 8,
            "learning_rate": args.learning_rate,
            "adam_beta2": 0.98,
            "warmup": 0.1,
            "schedule": "linear",
            "min_learning_rate": 0.0,
            "save_every": 0,
            "steps_per_eval": 0,
            "seed": seed,
        },
    )
    trainer = Trainer(config)
    trainer.run()
    assert trainer.val is not None
    own = trainer.evaluate(trainer.val)
    with EmbeddingCache.open(work / "float32") as cache:
        trainer.val.pictures = Pictures(None, args.images, cache)
        true = trainer.evaluate(trainer.val)
    return {"own": own, "float32": true}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval."""
    n = len(values)
    spread = float(np.std(values, ddof=1)) if n > 1 else math.inf
    return float(np.mean(values)), T95.get(n - 1, 2.2) * spread / math.sqrt(n)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training on int8 and int4 against float32.")
    parser.add_argument("--model", type=Path, required=True, help="a trained model")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--codecs", default="bf16,int8,int4", help="against float32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=80)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--train", default="projector", help="parts that train")
    args = parser.parse_args()
    codecs = ["float32", *args.codecs.split(",")]
    found: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = rows_of(args.data, args.pictures, work / "train.jsonl")
        names += rows_of(args.val, 10**9, work / "val.jsonl")
        sources = [(name, args.images / name) for name in dict.fromkeys(names)]
        encoder = load_encoder(str(args.model))
        for codec in codecs:
            write_cache(encoder, sources, work / codec, codec, batch_size=32)
        for seed, codec in itertools.product(range(args.seeds), codecs):
            if not (work / f"model-{seed}").exists():
                fresh(args.model, seed, work / f"model-{seed}")
            started = time.perf_counter()
            found[codec, seed] = train(args, work, codec, seed)
            print(
                f"seed {seed} {codec:8} validation loss {found[codec, seed]['float32']:.5f} on "
                f"float32, {found[codec, seed]['own']:.5f} on its own features "
                f"({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    print(f"\n{args.seeds} seeds, {args.iters} steps; difference of validation loss from float32")
    print("codec      on float32 features      on its own features")
    for codec in codecs[1:]:
        cells: list[Any] = []
        for kind in ("float32", "own"):
            pairs = [
                found[codec, seed][kind] / found["float32", seed][kind] - 1
                for seed in range(args.seeds)
            ]
            mean, half = interval(pairs)
            cells.append(f"{100 * mean:+.2f}% +- {100 * half:.2f}%".ljust(24))
        print(f"{codec:10} {' '.join(cells)}".rstrip())


if __name__ == "__main__":
    main()
