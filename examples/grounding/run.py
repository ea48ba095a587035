"""Everything but the tower from nothing: pictures, language model, build, cache, train, evaluate.

python -m examples.grounding.run --out runs/grounding           # some minutes of one core
python -m examples.grounding.run --out /tmp/toy --tiny          # toy length: that it runs
python -m examples.grounding.run --out runs/grounding --from train
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.grounding.scenes import WORDS
from examples.shapes import language
from examples.shapes.run import run
from examples.shapes.tokenizer import build

RECIPE = Path(__file__).resolve().parent / "recipe.toml"
DEMO = Path(__file__).resolve().parents[2] / "weights" / "demo"
STAGES = ("draw", "build", "cache", "train", "evaluate")
# Four blocks of the drawn world's small Llama.
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}


def commands(out: Path, tiny: bool) -> dict[str, list[str]]:
    """What each stage runs, as arguments of `python -m`."""
    data, base, cache = out / "data", out / "base", out / "cache"
    found: dict[str, list[str | Path]] = {
        "draw": ["examples.grounding.scenes", "--out", data],
        "build": ["mlxvlm", "build", "--vision", DEMO, "--language", out / "language"]
        + ["--tiling", "cover-2x2", "--view-marks", "separators"]
        + ["--projector", "c_abstractor", "--num-query-tokens", "16"]
        + ["--projector-width", "96", "--projector-layers", "1", "--layout", "llama-3"]
        + ["--out", base],
        "cache": ["mlxvlm", "cache-embeddings", data / "images", "--model", base]
        + ["--out", cache, "--codec", "fp16"],
        "train": ["mlxvlm", "sft", "--config", RECIPE, "--model", base, "--out", out / "model"]
        + ["--data", data / "train.jsonl", "--images", data / "images", "--cache", cache],
        "evaluate": ["examples.grounding.evaluate", "--model", out / "model", "--before", base],
    }
    if tiny:
        found["draw"] += ["--pictures", "8"]
        found["train"] += ["--iters", "2", "--batch-size", "2"]
        found["evaluate"] += ["--pictures", "2"]
    return {stage: [str(part) for part in parts] for stage, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all stages")
    parser.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0])
    parser.add_argument("--to", dest="last", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--tiny", action="store_true", help="toy length, in seconds")
    args = parser.parse_args()
    out = args.out.resolve()
    every = commands(out, args.tiny)
    for stage in STAGES[STAGES.index(args.first) : STAGES.index(args.last) + 1]:
        if stage == "build":
            language.save(out / "language", 0, build(WORDS), **SIZES)
        run(stage, every[stage])


if __name__ == "__main__":
    main()
