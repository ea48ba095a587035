"""Our trainer behind the benchmark's gate: python training_ours.py SUBJECT [--cache cache]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_gate import Gate
from training_subject import Shape

from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    parser.add_argument("--cache", default="", help="cache or projected; none runs the encoder")
    parser.add_argument("--whole-head", action="store_true", help="logits at every position")
    args = parser.parse_args()
    shape = Shape.load(args.subject)
    gate = Gate()

    def report(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            gate.loss = values["loss"]
            gate.more["waited"] = waits.pop()
            gate.closes()
            gate.opens()

    with tempfile.TemporaryDirectory() as out:
        config = stage_config(
            "lora",
            {
                "model": str(args.subject / "model"),
                "data": str(args.subject / "data"),
                "images": str(args.subject / "data" / "images"),
                "cache": str(args.subject / args.cache) if args.cache else "",
                "out": out,
                "train": "lora:lm",
                "iters": 10**6,
                "batch_size": shape.batch,
                "learning_rate": 1e-4,
                "schedule": "constant",
                "warmup": 0.0,
                "max_grad_norm": 0.0,
                "spike_factor": 0.0,
                "lora_rank": shape.rank,
                "lora_alpha": shape.scale * shape.rank,
                "lora_dropout": 0.0,
                "lora_keys": ",".join(f"{_home(key)}.{key}" for key in shape.keys.split(",")),
                "grad_checkpoint": shape.grad_checkpoint,
                "steps_per_report": 1,
                "steps_per_eval": 0,
                "save_every": 0,
            },
        )
        trainer = Trainer(config, report)
        read, waits = trainer.feed.read, []

        def timed(*arguments: Any, **options: Any) -> Any:
            reading = read(*arguments, **options)
            while True:
                began = time.perf_counter()
                item = next(reading)
                waits[:] = [time.perf_counter() - began]
                yield item

        trainer.feed.read = timed
        if args.whole_head:
            _supervise_everywhere(trainer)
        gate.opens()
        trainer.run()


def _home(key: str) -> str:
    return "self_attn" if key in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def _supervise_everywhere(trainer: Trainer) -> None:
    """Logits at every position, weighted 0 where nothing is supervised: the head's share."""
    import numpy as np

    fetch = trainer.feed.fetch

    def whole(*which: Any) -> Any:
        batch, found = fetch(*which)
        assert batch is not None and batch.prefix is None
        labels, weights = np.zeros(batch.tokens.size, np.int32), np.zeros(batch.tokens.size)
        labels[batch.predict] = batch.labels
        weights[batch.predict[batch.weights > 0]] = 1
        batch.predict = np.arange(batch.tokens.size, dtype=np.int32)
        batch.labels, batch.weights = labels, weights.astype(np.float32)
        return batch, found

    trainer.feed.fetch = whole


if __name__ == "__main__":
    main()
