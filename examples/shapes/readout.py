"""What frozen features give away: the same small readout on the features of several towers.

Each tower stays as it is; two fresh heads are trained on what it says of the same pictures: a
linear one of each patch, and learned queries with one attention for whole items (`encoder.Heads`).
Features are standardised by channel first. TOWER is a folder, or folder@-2 for the hidden state of
the last block but one.

    python -m examples.shapes.encoder --steps 0 --out runs/shapes/untrained
    python -m examples.shapes.readout runs/shapes/encoder runs/shapes/siglip runs/shapes/untrained
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from examples.shapes.drawing import draw
from examples.shapes.encoder import Heads, accuracy, fit, labels, loss, pixels
from examples.shapes.world import Scene, make_scene, seeds
from mlxvlm.weights.load import load_encoder

START = 700_000_000  # of the training split: no tower saw these
BATCH = 32
Tower = Callable[[mx.array], mx.array]


def open_tower(name: str) -> tuple[Tower, Any]:
    """pixels [N, S, S, 3] -> features [N, patches, D] of "folder" or "folder@layer"; its config."""
    folder, _, layer = name.partition("@")
    encoder = load_encoder(folder, feature_layer=int(layer) if layer else None)
    return encoder.vision, encoder.config


def features(tower: Tower, scenes: list[Scene]) -> np.ndarray:
    """float32 [scenes, patches, D]"""
    parts = (scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH))
    return np.concatenate([np.array(tower(pixels(map(draw, part)))) for part in parts])


def shuffled(
    shown: np.ndarray, target: np.ndarray, seed: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches without end, each pass in a new order."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(shown))
        for at in range(0, len(order) - BATCH + 1, BATCH):
            part = order[at : at + BATCH]
            yield mx.array(shown[part]), mx.array(target[part])


def read_out(
    name: str, scenes: list[Scene], target: np.ndarray, steps: int, count: int, seed: int
) -> dict[str, Any]:
    """Trains the heads on a tower's features; shares right on `count` held-out scenes."""
    cpu = time.process_time()
    tower, config = open_tower(name)
    seen = features(tower, scenes)
    mean, std = seen.mean((0, 1)), seen.std((0, 1)) + 1e-6
    seen = (seen - mean) / std
    mx.random.seed(seed)
    heads = Heads(config)
    losses = [value for _, value in fit(heads, loss, shuffled(seen, target, seed), steps, 2e-3)]
    offset, scale = mx.array(mean), mx.array(1 / std)
    found = accuracy(lambda shown: heads((tower(shown) - offset) * scale), count=count)
    return {"tower": name, "loss": losses[-1], "cpu_s": time.process_time() - cpu, **found}


def table(results: list[dict[str, Any]]) -> str:
    kinds = ("patches", "slots", "things", "bars", "numbers", "words", "edges", "scenes")
    lines = [f"| tower | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for result in results:
        shares = " | ".join(f"{100 * result[kind]:.1f}" for kind in kinds)
        lines.append(f"| {result['tower']} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="One small readout on several frozen towers.")
    parser.add_argument("towers", nargs="+", metavar="TOWER")
    parser.add_argument("--scenes", type=int, default=4000, help="to train the readout on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--eval", type=int, default=512, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the results as JSON to this file")
    args = parser.parse_args()
    source = seeds("train", START)
    scenes = [make_scene(next(source)) for _ in range(args.scenes)]
    target = np.stack([labels(scene) for scene in scenes])
    results = []
    for name in args.towers:
        results.append(read_out(name, scenes, target, args.steps, args.eval, args.seed))
        print(json.dumps(results[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
