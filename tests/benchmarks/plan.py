"""What a plan says of a run's memory, beside what the run takes: twelve configurations, here.

    python tests/benchmarks/plan.py [--only NAME] [--goal 10]

Each is a model of 30 to 80 million parameters with random weights; two real steps run in a process
of their own (the first has no moments yet). Exit 1 if any prediction is off by more than the goal,
in per cent. With OpenBLAS it takes about five minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
}
TWICE = {"grad_checkpoint": True}
LARGE = {"vocab_size": 128256, "num_hidden_layers": 4}
LONG = {"vocab_size": 65536, "num_hidden_layers": 4}
# name: stage, flags, changes of the language model, and what else is special.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "pretrain": ("pretrain", {}, {}, set()),
    "pretrain, cache": ("pretrain", {}, {}, {"cache"}),
    "sft": ("sft", {}, {}, set()),
    "sft, checkpointed": ("sft", TWICE, {}, set()),
    "sft, 2 micro-batches": (
        "sft",
        {"batch_size": 2, "grad_accumulation_steps": 2},
        {},
        {"cache"},
    ),
    "lora": ("lora", {}, {}, set()),
    "lora, cache, checkpointed": ("lora", TWICE, {}, {"cache"}),
    "lora, 128k words": ("lora", {}, LARGE, {"cache"}),
    "lora, long answers": ("lora", TWICE, LONG, {"long"}),
    "qlora": ("lora", {"batch_size": 1}, {}, {"4-bit"}),
    "lora, packed": ("lora", {"batching": "pack", "pack_length": 640, "batch_size": 2}, {}, set()),
    "lora, both towers": ("lora", {"train": "projector,lora:lm,lora:vision"}, {}, set()),
}


def make_model(folder: Path, changes: dict[str, Any], bits: int = 0, **vision: Any) -> Path:
    """A model with random weights."""
    import mlx.core as mx
    import mlx.nn as nn
    from tiny_vlm import tiny_config, tiny_tokenizer

    from mlxvlm.config import ProjectorConfig, TilingConfig, VisionConfig
    from mlxvlm.model import VLM
    from mlxvlm.weights.save import quantization_of, save

    mx.random.seed(0)
    tower = VisionConfig(**{**VISION, **vision})
    config = tiny_config(
        language={**LANGUAGE, **changes},
        vision=tower,
        tiling=TilingConfig(image_size=tower.image_size),
        projector=ProjectorConfig(),
    )
    vlm = VLM(config, tiny_tokenizer())
    if bits:
        nn.quantize(vlm.language, group_size=64, bits=bits)
        vlm.config.quantization = quantization_of(vlm)
    mx.eval(vlm.parameters())
    save(vlm, folder)
    return folder


def make_data(folder: Path, words: int, rows: int = 8) -> Path:
    """Rows about four pictures, with answers of so many words."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.png")
    question = {"role": "user", "content": "what is this?"}
    answer = {"role": "assistant", "content": "word " * words}
    with (folder / "train.jsonl").open("w") as out:
        for number in range(rows):
            row = {"image": f"{number % 4}.png", "messages": [question, answer]}
            out.write(json.dumps(row) + "\n")
    return folder


def make_cache(folder: Path, model: Path, data: Path) -> Path:
    from mlxvlm.cache.writer import write_cache
    from mlxvlm.weights.load import load

    sources = [(path.name, path) for path in sorted((data / "images").iterdir())]
    write_cache(load(model).encoder, sources, folder, codec="float32")
    return folder


def compare(stage: str, flags: dict[str, Any]) -> tuple[int, int]:
    """(predicted, measured) bytes of a run's heaviest step."""
    from mlxvlm.machine.rehearse import rehearse
    from mlxvlm.machine.study import Study
    from mlxvlm.train.stages import stage_config

    config = stage_config(stage, {**flags, "out": "nowhere"})
    predicted = Study(config).step().peak.bytes
    found = rehearse(config, steps=0)
    if found.failure or not found.peak:
        raise SystemExit(found.failure or "no step ran")
    return predicted, found.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--goal", type=float, default=10)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        predicted, measured = compare(options.one[0], json.loads(options.one[1]))
        print(json.dumps([predicted, measured]))
        return 0
    worst = 0.0
    print(f"{'configuration':<28}{'predicted':>12}{'measured':>12}{'off':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (stage, flags, changes, extra)) in enumerate(CONFIGURATIONS.items()):
            if options.only not in name:
                continue
            place = Path(folder) / str(number)
            data = make_data(place / "data", 100 if "long" in extra else 10)
            model = make_model(place / "model", changes, 4 if "4-bit" in extra else 0)
            given = {**flags, "model": str(model), "data": str(data), "iters": 2}
            given["images"] = str(data / "images")
            if "cache" in extra:
                given["cache"] = str(make_cache(place / "cache", model, data))
            # In a process of its own, so that no configuration meets another's memory.
            done = subprocess.run(
                [sys.executable, __file__, "--one", stage, json.dumps(given)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(f"{name}: {done.stderr.strip()}")
                return 1
            predicted, measured = json.loads(done.stdout)
            off = 100 * (predicted / measured - 1)
            worst = max(worst, abs(off))
            print(
                f"{name:<28}{predicted / 1e6:>9.1f} MB{measured / 1e6:>9.1f} MB{off:>+8.1f}%",
                flush=True,
            )
    print(f"worst: {worst:.1f}% (goal: {options.goal:g}%)")
    return int(worst > options.goal)


if __name__ == "__main__":
    sys.exit(main())
