"""Frozen against unfrozen: the same small language model learns on several towers, both ways.

A smaller drawn world (up to three things or prints, or a chart), nine kinds of questions, and a
language model of 128 x 4. Frozen, features come from a cache, as in the demo's recipe; unfrozen,
the tower learns with the rest, at a third of the rate, and sees its pictures afresh at each step. A
step of the second kind costs more: with --cpu both get the steps that the same CPU seconds pay for.

    python -m examples.shapes.thaw --out runs/thaw --tower runs/shapes/encoder --seed 0
    python -m examples.shapes.thaw --out runs/thaw --tower runs/shapes/encoder --seed 0 --unfrozen
    python -m examples.shapes.thaw --out runs/thaw --table
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlxvlm
from examples.shapes import language
from examples.shapes.data import align, dump, name_of, rows
from examples.shapes.drawing import draw
from examples.shapes.evaluate import features, right_answers
from examples.shapes.exam import asks, wilson
from examples.shapes.qa import QA
from examples.shapes.questions import ask_many, ask_one
from examples.shapes.world import Scene, make_scene, seeds
from mlxvlm.cli.main import app
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import AuxiliaryTarget, stage_config

KINDS = tuple("shape color size at where count_all bar_value number word".split())
MOST = 3  # things and prints in a picture
RATE = 2e-3
PART = 8  # pictures a step, each with 8 questions
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def small_scenes(split: str) -> Iterator[Scene]:
    for seed in seeds(split):
        scene = make_scene(seed)
        if scene.kind != "texture" and len(scene.items) <= MOST:
            yield scene


def questions(scene: Scene) -> list[QA]:
    kinds = [kind for kind in KINDS if asks(scene, kind)]
    return ask_many(scene, 8, "thaw", dict.fromkeys(kinds, 1.0))


def write_data(out: Path, count: int) -> None:
    """`count` pictures with up to 8 questions each, and the language model to start from."""
    with (out / "rows.jsonl").open("w") as file:
        for i, scene in zip(range(count), small_scenes("train"), strict=False):
            path = out / "images" / name_of(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(scene).save(path, compress_level=1)
            dump(rows(name_of(i), [[qa] for qa in questions(scene)], align(scene)), file)


def take(each: int) -> list[tuple[Scene, QA]]:
    """`each` held-out questions of every kind, no two of a kind about one picture."""
    missing: dict[str, int] = dict.fromkeys(KINDS, each)
    found = []
    for scene in small_scenes("heldout"):
        for kind in [kind for kind, left in missing.items() if left and asks(scene, kind)]:
            qa = ask_one(kind, scene, "exam")
            if qa is not None:
                missing[kind] -= 1
                found.append((scene, qa))
        if not any(missing.values()):
            break
    return found


def recipe(steps: int, unfrozen: bool, seed: int) -> dict[str, Any]:
    """The demo's first stage, shorter."""
    vision = {"train": "projector,lm,vision", "vision_learning_rate": RATE / 3}
    return {
        "train": "projector,lm",
        **(vision if unfrozen else {}),
        "iters": steps,
        "seed": seed,
        "batch_size": PART,
        "share_prefix": 8,
        "length_multiple": 8,
        "max_seq_length": 256,
        "learning_rate": RATE,
        "adam_beta2": 0.98,
        "weight_decay": 0.05,
        "warmup": min(50, max(1, steps // 8)),
        "hold": 0.4,
        "schedule": "linear",
        "min_learning_rate": 0.02,
        "save_every": 0,
        "targets": {
            "ground": AuxiliaryTarget(2, 0.5),
            "align": AuxiliaryTarget(0, 0.5),
        },
    }


def run(
    out: Path, tower: Path, unfrozen: bool, seed: int, steps: int, cpu_s: float, each: int
) -> dict[str, Any]:
    """Builds, trains and measures one model. cpu_s: 0 takes `steps`; else the steps that fit."""
    folder = out / f"{tower.name}-{'unfrozen' if unfrozen else 'frozen'}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base, cache = folder / "base", out / f"cache-{tower.name}"
    words = out / f"language-{seed}"
    if not words.exists():
        language.save(words, seed, None, **SIZES, **HEADS)
    build = ["build", "--vision", tower, "--language", words, "--out", base, "--seed", seed]
    build += ["--projector-width", 128, "--projector-heads", 4, "--num-positions", 64]
    app([str(part) for part in [*build, "--layout", "llama-3"]], standalone_mode=False)
    if not unfrozen:
        job = ["cache-embeddings", out / "images", "--model", tower, "--out", cache]
        job += ["--codec", "float32", "--batch-size", 64]
        app([str(part) for part in job], standalone_mode=False)
    flags = {
        "model": str(base),
        "data": [str(out / "rows.jsonl")],
        "images": str(out / "images"),
        **({} if unfrozen else {"cache": str(cache)}),
    }

    def train(steps: int, to: Path) -> tuple[list[float], dict[str, Any]]:
        """CPU seconds at which steps ended, from the first step's start on."""
        config = stage_config("pretrain", flags | {"out": str(to)} | recipe(steps, unfrozen, seed))
        marks = [time.process_time()]
        trainer = Trainer(
            config,
            lambda kind, values: marks.append(time.process_time()) if kind == "step" else None,
        )
        marks[0] = time.process_time()
        return marks, trainer.run()

    if cpu_s:
        tried, _ = train(14, folder / "tried")
        # The first steps also compile.
        steps = max(20, int(cpu_s / ((tried[-1] - tried[4]) / (len(tried) - 5))))
    marks, summary = train(steps, folder / "model")
    vlm = mlxvlm.load(folder / "model")
    asked = take(each)
    seen = features(vlm, [scene for scene, _ in asked])
    verdicts = right_answers(vlm, [(seen[scene.seed], qa) for scene, qa in asked])
    kinds = {kind: [0, 0] for kind in KINDS}
    for (_, qa), ok in zip(asked, verdicts, strict=True):
        kinds[qa.kind][0] += ok
        kinds[qa.kind][1] += 1
    result = {
        "tower": tower.name,
        "unfrozen": unfrozen,
        "seed": seed,
        "steps": steps,
        "cpu_s": round(marks[-1] - marks[0], 1),
        "loss": summary["loss"],
        "mean": sum(right / count for right, count in kinds.values()) / len(kinds),
        "kinds": kinds,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One line for each tower and way, seeds put together."""
    lines = [
        f"| tower | vision | seeds | steps | CPU s | right | 95% | {' | '.join(KINDS)} |",
        "|---|---|---:|---:|---:|---:|---|" + "---:|" * len(KINDS),
    ]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["tower"], result["unfrozen"]), []).append(result)
    for (tower, unfrozen), runs in sorted(groups.items()):
        sums = {kind: [sum(r["kinds"][kind][i] for r in runs) for i in (0, 1)] for kind in KINDS}
        right, asked = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
        low, high = wilson(right, asked)
        steps, cpu = (sum(r[name] for r in runs) / len(runs) for name in ("steps", "cpu_s"))
        shares = " | ".join(f"{100 * a / b:.0f}" for a, b in sums.values())
        lines.append(
            f"| {tower} | {'unfrozen' if unfrozen else 'frozen'} | {len(runs)} | {steps:.0f} "
            f"| {cpu:.0f} | {100 * right / asked:.1f} | {100 * low:.1f} to {100 * high:.1f} "
            f"| {shares} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small model on a tower, frozen or not.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="a SigLIP's folder")
    parser.add_argument("--unfrozen", action="store_true", help="the tower learns, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cpu", type=float, default=0.0, help="CPU seconds instead of steps")
    parser.add_argument("--scenes", type=int, default=3000, help="pictures, when none are there")
    parser.add_argument("--each", type=int, default=100, help="held-out questions of each kind")
    parser.add_argument("--table", action="store_true", help="print all results in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tower:
        if not (args.out / "rows.jsonl").exists():
            write_data(args.out, args.scenes)
        result = run(
            args.out, args.tower, args.unfrozen, args.seed, args.steps, args.cpu, args.each
        )
        print(json.dumps(result), flush=True)
    if args.table:
        found = sorted(args.out.glob("*/result.json"))
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in found]))


if __name__ == "__main__":
    main()
