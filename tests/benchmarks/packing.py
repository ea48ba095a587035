"""What packing gives over buckets: real tokens a second of whole training steps, interleaved.

    python tests/benchmarks/packing.py [--visual 196] [--text 10 400] [--batch-size 4] [--rounds 3]

The trunk is small and frozen but for a projector and adapters, as in `lora`. Prints, for buckets,
for packs of several lengths and for InternVL's, the padding and the median tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny_vlm import IMAGE, tiny_config  # noqa: E402

from mlxvlm.config import LoRAConfig, ProjectorConfig  # noqa: E402
from mlxvlm.data.batching import Batching  # noqa: E402
from mlxvlm.data.feed import Feed  # noqa: E402
from mlxvlm.data.samples import Sample  # noqa: E402
from mlxvlm.images.picture import Cut  # noqa: E402
from mlxvlm.language.lora import add_lora  # noqa: E402
from mlxvlm.model import VLM  # noqa: E402
from mlxvlm.train.losses import batch_loss, count, gradients  # noqa: E402


class Names:
    """Features are made up on the spot, one view a picture."""

    def get(self, name: str, among: int) -> str:
        return name


def make_rows(count: int, visual: int, text: tuple[int, int], text_only: float) -> list[Sample]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pictured = rng.random() >= text_only
        words = rng.integers(3, 200, int(rng.integers(*text)))
        head = [IMAGE] * (visual * pictured)
        tokens = np.concatenate([head, words]).astype(np.int32)
        learnt = np.zeros(len(tokens), bool)
        learnt[-max(1, len(words) // 2) :] = True
        slots, cuts = ([(0, visual)], [Cut(1)]) if pictured else ([], [])
        rows.append(Sample(tokens, learnt, [str(number)] * pictured, slots=slots, cuts=cuts))
    return rows


def model(hidden: int, layers: int, vocab: int) -> VLM:
    config = tiny_config(projector=ProjectorConfig(type="mlp"))
    config.language |= {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }
    vlm = VLM(config)
    vlm.freeze()
    vlm.projector.unfreeze()
    add_lora(vlm.language, LoRAConfig(rank=8))
    mx.eval(vlm.parameters())
    return vlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--visual", type=int, default=196)
    parser.add_argument("--text", type=int, nargs=2, default=(10, 400))
    parser.add_argument("--text-only", type=float, default=0.0, help="share of rows")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3, help="micro-batches a mode and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    args = parser.parse_args()
    rows = make_rows(args.rows, args.visual, tuple(args.text), args.text_only)
    vlm = model(args.hidden, args.layers, args.vocab)
    mean = float(np.mean([row.length for row in rows]))
    width = vlm.config.vision.hidden_size
    gradient = nn.value_and_grad(vlm, batch_loss)
    settings: dict[str, Batching] = {
        "buckets": Batching(args.batch_size),
        "auto": Batching(args.batch_size, "auto"),
    }
    for length in (640, 1024, 2048):
        lines = max(1, round(args.batch_size * mean / length))
        settings[f"pack {length:,}"] = Batching(lines, "pack", pack_length=length)
    settings["internvl 2,048"] = Batching(
        max(1, round(args.batch_size * mean / 2048)), "internvl", pack_length=2048
    )
    feeds = {}
    for name, batching in settings.items():
        batching.width = args.hidden
        feeds[name] = Feed(rows, Names(), batching)  # type: ignore[arg-type]
    speeds: dict[str, list[float]] = {name: [] for name in feeds}
    peaks: dict[str, float] = dict.fromkeys(feeds, 0.0)
    orders = {name: feed.order(0) for name, feed in feeds.items()}
    # On a shared CPU the seconds of this process say more than those of the wall.
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    for _ in range(args.rounds):
        for name, feed in feeds.items():
            done = spent = 0.0
            mx.reset_peak_memory()
            for _ in range(args.steps):
                batch, found = feed.fetch(next(orders[name]))
                assert batch is not None
                views = mx.random.normal((len(found), args.visual, width)) if found else None
                mx.eval(views)
                started = clock()
                parameters = vlm.trainable_parameters()
                flat, _ = gradients(gradient, vlm, batch, views, {}, count([batch]))
                mx.eval(flat)
                vlm.update(parameters)
                spent += clock() - started
                done += batch.num_tokens
            speeds[name].append(done / spent)
            peaks[name] = max(peaks[name], mx.get_peak_memory() / 1e9)
    base = statistics.median(speeds["buckets"])
    for name, feed in feeds.items():
        chosen = feed.plan.decision
        speed = statistics.median(speeds[name])
        shape = f"{chosen.lines} x {chosen.length:,}" if chosen.length else "buckets"
        print(
            f"{name:16} {shape:10} {chosen.rows:5.1f} rows  padding {chosen.padding:6.1%}"
            f"  {speed:8,.0f} tok/s  {speed / base:.2f}x  peak {peaks[name]:.2f} GB"
        )


if __name__ == "__main__":
    main()
