"""What did the work, and which projector to take: many small runs of the recipe, compared.

python -m examples.shapes.study prepare --out runs/study --encoder runs/shapes/encoder
python -m examples.shapes.study run --out runs/study        # goes on where it was
python -m examples.shapes.study report --out runs/study     # Markdown tables, and the plot

All variants of a study (`study_variants`) share the encoder, the language model they start from,
the pictures and the number of steps, and differ in what their rows in the tables say. A run is
build, then one or two stages, each measured (`study_run`), in a process of its own;
runs/VARIANT-SEED/result.json says that it is finished. All variants run with one seed before the
next seed begins, so that an early stop leaves whole tables.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.shapes import study_data as data
from examples.shapes.language import save as save_language
from examples.shapes.study_variants import ALL, NAMES, Variant
from examples.shapes.tokenizer import learn

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 960
BPE_SIZE = 384
BPE_TEXTS = 2000  # scenes whose texts it is learnt from
# The language model: 0.8 million weights.
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def caches(variants: list[Variant]) -> dict[str, tuple[str, str]]:
    """Folder of each cache that is needed: its codec and its pooling."""
    return {cache_of(variant): (variant.codec, pool_of(variant)) for variant in variants}


def pool_of(variant: Variant) -> str:
    """What of the pooling comes before the projector, and is cached."""
    return "mean2" if variant.build.get("pool") == "mean2" else "none"


def cache_of(variant: Variant) -> str:
    return f"cache-{variant.codec}" + ("" if pool_of(variant) == "none" else "-mean2")


def language_of(variant: Variant, seed: int) -> str:
    kind = variant.start if variant.start == "taught" else "words" if variant.rows.words else "bpe"
    return f"language/{kind}-{seed}"


def prepare(
    out: Path, encoder: Path, seeds: list[int], variants: list[Variant], pictures: int
) -> None:
    """Everything that runs share; what is there already stays."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "encoder").exists():
        shutil.copytree(encoder, out / "encoder")
    rows = sorted({variant.rows for variant in variants}, key=lambda each: each.name)
    data.draw_pictures(out / "images", pictures * max(100, *(r.percent for r in rows)) // 100)
    bpe = None if all(r.words for r in rows) else learn(data.texts(BPE_TEXTS), BPE_SIZE)
    for each in rows:
        if not (out / "data" / each.name / "sft.jsonl").exists():
            data.write(out / "data", each, pictures, None if each.words else bpe)
    for variant in variants:
        for seed in seeds if variant.start == "fresh" else ():
            folder = out / language_of(variant, seed)
            if not (folder / "model.safetensors").exists():
                save_language(folder, seed, None if variant.rows.words else bpe, **SIZES)
    for folder, (codec, pool) in caches(variants).items():
        needed = max(v.rows.percent for v in variants if cache_of(v) == folder)
        count = pictures * max(100, needed) // 100
        flags = ["--model", "encoder", "--out", folder, "--codec", codec, "--pool", pool]
        flags += ["--batch-size", "64", "--limit", str(count)]
        done = out / folder / f"done-{count}"
        if not done.exists():
            command(out, ["mlxvlm", "cache-embeddings", "images", *flags])
            done.touch()


def command(out: Path, arguments: list[str], log: Path | None = None) -> int:
    """Runs `python -m` in the studies' folder; its exit status."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    line = [sys.executable, "-m", *arguments]
    if log is None:
        return subprocess.run(line, cwd=out, env=environment, check=True).returncode
    with log.open("w") as file:
        done = subprocess.run(line, cwd=out, env=environment, stdout=file, stderr=file)
    return done.returncode


def queue(out: Path, seeds: list[int], variants: list[Variant]) -> list[tuple[Variant, int]]:
    """Runs that are not finished, seed by seed; in a seed, what others start from comes first."""
    found = []
    for seed in seeds:
        for variant in variants:
            if not (folder_of(out, variant, seed) / "result.json").exists():
                found.append((variant, seed))
    return found


def folder_of(out: Path, variant: Variant, seed: int) -> Path:
    return out / "runs" / f"{variant.name}-{seed}"


def run(
    out: Path, seeds: list[int], variants: list[Variant], each: int, until: float | None = None
) -> list[str]:
    """Runs what is missing; the names of runs that failed, whose logs stay in their folders."""
    failed = []
    waiting = queue(out, seeds, variants)
    for at, (variant, seed) in enumerate(waiting, 1):
        if until is not None and time.time() > until:
            print(f"Out of time; {len(waiting) - at + 1} runs are left.", flush=True)
            break
        folder = folder_of(out, variant, seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.perf_counter()
        flags = ["--variant", variant.name, "--seed", str(seed), "--each", str(each)]
        status = command(out, ["examples.shapes.study_run", *flags], folder / "log.txt")
        seconds = time.perf_counter() - started
        told = f"{at}/{len(waiting)} {variant.name}-{seed}: {seconds:.0f} s"
        if status:
            failed.append(f"{variant.name}-{seed}")
            print(f"{told}, failed: {folder / 'log.txt'}", flush=True)
        else:
            print(told, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the recipe many times over, and compares.")
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("prepare", "run", "report"):
        action = actions.add_parser(name)
        action.add_argument("--out", type=Path, required=True)
        if name == "report":
            action.add_argument("--plot", type=Path, help="also draw all results to this PNG file")
            action.add_argument("--page", type=Path, help="also write the tables into this page")
            action.add_argument("--json", type=Path, help="also write all results to this file")
            continue
        action.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        action.add_argument("--variants", nargs="+", choices=list(NAMES), default=list(NAMES))
        if name == "prepare":
            action.add_argument("--encoder", type=Path, required=True)
            action.add_argument("--pictures", type=int, default=PICTURES)
        else:
            action.add_argument("--each", type=int, default=60, help="questions of each kind")
            action.add_argument("--minutes", type=float, help="start no run after so long")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.action == "report":
        from examples.shapes import study_report

        study_report.write(out, args.plot, args.json, args.page)
        return
    variants = [variant for variant in ALL if variant.name in args.variants]
    if args.action == "prepare":
        prepare(out, args.encoder.resolve(), args.seeds, variants, args.pictures)
        return
    until = time.time() + 60 * args.minutes if args.minutes else None
    if failed := run(out, args.seeds, variants, args.each, until):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
