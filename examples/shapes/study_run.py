"""One run of a study: build, train, measure. It runs in the studies' folder, where names start.

cd runs/study && python -m examples.shapes.study_run --variant mlp --seed 0
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import mlxvlm
from examples.shapes import study_data as data
from examples.shapes.evaluate import features, right_answers
from examples.shapes.qa import QA
from examples.shapes.study import cache_of, folder_of, language_of
from examples.shapes.study_variants import FIRST, NAMES, Flags, Variant, recipe
from mlxvlm.cli.main import app
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config

CHATS = 60
SKIP = 5  # first steps, which also read and compile


def toml(fields: Flags) -> str:
    """A recipe file; JSON writes these values as TOML does."""
    plain = [f"{k} = {json.dumps(v)}" for k, v in fields.items() if not isinstance(v, dict)]
    for name, table in fields.get("targets", {}).items():
        plain += ["", f"[targets.{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(plain) + "\n"


def build_command(variant: Variant, seed: int, base: str) -> list[str]:
    found = ["build", "--vision", "encoder", "--language", language_of(variant, seed)]
    found += ["--out", base]
    for name, value in variant.build.items():
        found += [f"--{name}", str(value)]
    return [*found, "--layout", "llama-3", "--seed", str(seed)]


def stage_flags(variant: Variant, stage: str, model: str, out: str) -> Flags:
    return {
        "config": f"{out}.toml",
        "model": model,
        "data": [f"data/{variant.rows.name}/{stage}.jsonl"],
        "images": "images",
        "cache": cache_of(variant),
        "out": out,
    }


def train(stage: str, flags: Flags) -> dict[str, Any]:
    """Runs a stage; CPU seconds of each step, and the most memory that MLX held."""
    config = stage_config(stage, {k: v for k, v in flags.items() if k != "config"}, flags["config"])
    marks: list[float] = []
    skipped: list[str] = []

    def report(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            marks.append(time.process_time())
        if kind == "data":
            print(json.dumps(values, default=str))
            skipped.extend(values["skipped"])

    started, cpu = time.perf_counter(), time.process_time()
    mx.reset_peak_memory()
    summary = Trainer(config, report).run()
    steps = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    lines = Path(config.out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [json.loads(line)["tokens"] for line in lines]
    return {
        "steps": len(marks),
        "rows_skipped": len(skipped),
        "loss": summary["loss"],
        "step_cpu_s": round(statistics.median(steps[SKIP:] or steps or [0.0]), 4),
        "tokens_a_step": round(statistics.mean(tokens)),
        "peak_memory_mb": round(mx.get_peak_memory() / 1e6, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def measure(vlm: Any, variant: Variant, each: int, chats: int) -> dict[str, list[int]]:
    """[right, asked] by kind, whole chats last."""
    asked: list = data.exam(each, variant.rows.restated)
    asked += data.chats(chats, variant.rows.restated)
    seen = features(vlm, [scene for scene, _ in asked])
    verdicts = right_answers(vlm, [(seen[scene.seed], qa) for scene, qa in asked])
    found = {kind: [0, 0] for kind in (*data.KINDS, "chats")}
    for (_, qa), right in zip(asked, verdicts, strict=True):
        score = found[qa.kind if isinstance(qa, QA) else "chats"]
        score[0] += right
        score[1] += 1
    return found


def lift_language(model: Path, to: Path) -> None:
    """The language model of a whole one, as a folder of its own."""
    vlm = mlxvlm.load(model)
    to.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, to)
    raw = json.dumps(vlm.config.language, indent=2)
    (to / "config.json").write_text(raw + "\n", encoding="utf-8")
    weights = dict(tree_flatten(vlm.language.parameters()))
    mx.save_safetensors(str(to / "model.safetensors"), weights, metadata={"format": "mlx"})


def size_of(module: Any) -> int:
    """How many weights a part has."""
    weights: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return sum(weight.size for weight in weights.values())


def one(variant: Variant, seed: int, each: int) -> dict[str, Any]:
    """Runs the variant; its result."""
    started, cpu = time.perf_counter(), time.process_time()
    folder = folder_of(Path(), variant, seed)
    model, written = str(folder / "base"), []
    if variant.start == "pretrained":
        model = str(folder_of(Path(), NAMES[FIRST], seed) / "pretrain")
    else:
        if variant.start == "taught":
            lift_language(
                folder_of(Path(), NAMES[FIRST], seed) / "sft", Path(language_of(variant, seed))
            )
        arguments = build_command(variant, seed, model)
        written.append(f"mlxvlm {shlex.join(arguments)}")
        app(arguments, standalone_mode=False)
    result: dict[str, Any] = {"variant": variant.name, "seed": seed}
    for stage in variant.stages:
        flags = stage_flags(variant, stage, model, str(folder / stage))
        fields = recipe(variant, stage, seed)
        Path(flags["config"]).write_text(toml(fields), encoding="utf-8")
        lora = "lora:" in fields["train"]
        name = "lora" if lora else stage
        written.append(f"mlxvlm {name} " + " ".join(_flag(k, v) for k, v in flags.items()))
        result[stage] = train(name, flags)
        vlm = mlxvlm.load(model, flags["out"]) if lora else mlxvlm.load(flags["out"])
        result[stage] |= {"right": measure(vlm, variant, each, CHATS if stage == "sft" else 0)}
        # Adapters go into their model before the next stage puts new ones on it.
        if lora:
            arguments = ["fuse", "--model", model, "--adapter-path", flags["out"]]
            model = f"{flags['out']}-fused"
            written.append(f"mlxvlm {shlex.join([*arguments, '--out', model])}")
            app([*arguments, "--out", model], standalone_mode=False)
        else:
            model = flags["out"]
    sizes = {part: size_of(vlm[part]) for part in ("projector", "language")}
    result |= {
        "tokens_a_picture": vlm.config.tokens_per_view,
        "parameters": sizes,
        "commands": written,
        "cpu_s": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result


def _flag(name: str, value: Any) -> str:
    return f"--{name} {value[0] if isinstance(value, list) else value}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One run of a study.")
    parser.add_argument("--variant", choices=list(NAMES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=60, help="questions of each kind")
    args = parser.parse_args()
    variant = NAMES[args.variant]
    result = one(variant, args.seed, args.each)
    folder = folder_of(Path(), variant, args.seed)
    beside = folder / "result.json.partial"
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / "result.json")


if __name__ == "__main__":
    main()
