"""Makes the demo model from nothing: every stage is one command, and this runs them in order.

python -m examples.shapes.run --out runs/shapes             # all stages: some 4 hours of one core
python -m examples.shapes.run --out runs/shapes --from sft  # again from one stage on
python -m examples.shapes.run --out /tmp/toy --tiny         # toy length: that everything runs

draw       the pictures, the questions and their targets       examples.shapes.data
encoder    pre-train the small SigLIP tower                    examples.shapes.encoder
language   a fresh small Llama and its tokenizer               examples.shapes.language
build      encoder + fresh projector + Llama                   mlxvlm build
cache      the frozen encoder's features, once                 mlxvlm cache-embeddings
pretrain   single questions                                    mlxvlm pretrain
sft        chats of four turns                                 mlxvlm sft
evaluate   held-out scenes, generated answers, chats           examples.shapes.evaluate
ship       (only with --ship DIR) the model's own files        mlxvlm's load and save
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.shapes.phrases import OUTSIDE

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).resolve().parent / "recipe"
ABOUT = (
    "A small demo model: it knows drawn scenes: shapes, printed "
    "words and numbers, bar charts; nothing else."
)
STAGES = ("draw", "encoder", "language", "build", "cache", "pretrain", "sft", "evaluate")


def commands(out: Path, tiny: bool) -> dict[str, list[str]]:
    """What each stage runs, as arguments of `python -m`."""
    data, cache = out / "data", out / "cache"
    encoder, language, base = out / "encoder", out / "language", out / "base"
    result = {stage: out / stage for stage in ("pretrain", "sft")}
    training = ["--images", data / "images", "--cache", cache, "--val-data", data / "val.jsonl"]
    found: dict[str, list[str | Path]] = {
        "draw": ["examples.shapes.data", "--out", data],
        "encoder": ["examples.shapes.encoder", "--out", encoder],
        "language": ["examples.shapes.language", "--out", language],
        "build": ["mlxvlm", "build", "--vision", encoder, "--language", language, "--out", base]
        + ["--projector-width", "160", "--projector-heads", "5", "--num-positions", "64"]
        + ["--layout", "llama-3", "--about", ABOUT, "--refusal", OUTSIDE],
        "cache": ["mlxvlm", "cache-embeddings", data / "images", "--model", encoder]
        + ["--out", cache, "--codec", "float32", "--batch-size", "64"],
        "pretrain": ["mlxvlm", "pretrain", "--config", RECIPES / "pretrain.toml", "--model", base]
        + ["--data", data / "pretrain.jsonl", "--out", result["pretrain"], *training],
        "sft": ["mlxvlm", "sft", "--config", RECIPES / "sft.toml", "--model", result["pretrain"]]
        + ["--data", data / "sft.jsonl", "--out", result["sft"], *training],
        "evaluate": ["examples.shapes.evaluate", "--model", result["sft"]]
        + ["--out", out / "evaluation.json"],
    }
    if tiny:
        found["draw"] += ["--scenes", "40", "--val", "4"]
        found["encoder"] += ["--steps", "4", "--batch-size", "4", "--eval", "32"]
        found["pretrain"] += ["--iters", "4", "--batch-size", "2"]
        found["sft"] += ["--iters", "3", "--batch-size", "2"]
        found["evaluate"] += ["--each", "2", "--blind-scenes", "20"]
        found["evaluate"] += ["--boxes", "2", "--generate", "1", "--chats", "1"]
    return {stage: [str(part) for part in parts] for stage, parts in found.items()}


def run(stage: str, command: list[str]) -> None:
    """Runs one stage in a process of its own, from the repository's root; stops where it fails."""
    print(f"\n{stage}: python -m {shlex.join(command)}", flush=True)
    if command[:2] in (["mlxvlm", "build"], ["mlxvlm", "pretrain"], ["mlxvlm", "sft"]):
        # These refuse to write over a model; here an earlier one is meant to go.
        shutil.rmtree(command[command.index("--out") + 1], ignore_errors=True)
    start = time.perf_counter()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)


def ship(model: Path, to: Path) -> None:
    """Copies a result in float16, without its run's metrics and checkpoints."""
    import mlxvlm
    from mlxvlm.weights.save import save

    save(mlxvlm.load(model, dtype="float16"), to)
    total = sum(file.stat().st_size for file in to.iterdir())
    print(f"{to}: {total / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes the demo model from nothing, stage by stage."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all stages")
    parser.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0])
    parser.add_argument("--to", dest="last", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--tiny", action="store_true", help="toy length, in seconds")
    parser.add_argument("--ship", type=Path, help="at the end, copy the model to this folder")
    args = parser.parse_args()
    out = args.out.resolve()
    every = commands(out, args.tiny)
    for stage in STAGES[STAGES.index(args.first) : STAGES.index(args.last) + 1]:
        run(stage, every[stage])
    if args.ship:
        ship(out / "sft", args.ship)


if __name__ == "__main__":
    main()
