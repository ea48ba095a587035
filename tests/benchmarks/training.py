"""Every figure of training in one run: step time and peak memory, beside other trainers.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/training.py \\
        [--quick] [--mlx-vlm PYTHON] [--unsloth PYTHON] [--only steps,memory]

--mlx-vlm and --unsloth name the interpreters of environments with mlx-vlm 0.7.10, and with
unsloth_zoo 2026.10.9, mlx-vlm 0.7.9, transformers 5.17, datasets 4 and torch; or give them as
MLX_VLM_PYTHON and UNSLOTH_PYTHON. mlx-lm is in ours. A peer that is not installed is left out.

Each trainer runs its own loop in a process of its own and takes turns with the others, a step each.
Figures are CPU seconds, which other work on the machine moves least. Ratios are those of medians
over the rounds; in brackets, the least and the most of the rounds' own. Some ten minutes on a quiet
machine; --quick takes two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_subject import Shape, make

HERE = Path(__file__).resolve().parent
EQUAL = """\
Equal for all: weights, rows, tokens, supervised positions and float32; LoRA of one rank, scale and
set of layers, without dropout, on a frozen rest; AdamW at a constant rate, no decay, no clipping; a
batch a step; no gradient checkpointing unless said. The first losses show it. Not equal: mlx-lm
sees as many text tokens instead of pictures, and supervises a padding token a row more; it compiles
its step, the others do not; mlx-vlm gets ready pixels and two mended faults; Unsloth and ours
without a cache open pictures; ours with a cache reads bf16 features."""


@dataclass
class Trainer:
    """One contender: how it is started, and the figures of its steps."""

    name: str
    command: list[str]
    goal: float = 0.0

    def start(self, subject: Path) -> None:
        script, *flags = self.command[1:]
        command = [self.command[0], str(HERE / script), str(subject), *flags]
        pipe = subprocess.PIPE
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
        )
        self.steps: list[dict[str, Any]] = []
        self._read("ready")

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._read("step"))
        self._read("ready")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            tail = self.errors.read().decode(errors="replace")[-2000:]
            sys.exit(f"{self.name} ended early:\n{tail}")
        found = json.loads(line)
        assert found["kind"] == kind, found
        return found

    @property
    def cpu(self) -> list[float]:
        """CPU seconds of each step but the first, which builds and warms things up."""
        return [step["cpu"] for step in self.steps[1:]]

    @property
    def peak(self) -> float:
        """The most that MLX held, in MB: from loading on."""
        return self.steps[-1]["peak"] / 1e6


def trainers(args: argparse.Namespace, pictures: bool) -> list[Trainer]:
    ours = [sys.executable, "training_ours.py"]
    if not pictures:
        return [
            Trainer("ours", ours),
            Trainer("mlx-lm", [sys.executable, "training_mlx_lm.py"], 1.15),
        ]
    found = [
        Trainer("ours, cache", [*ours, "--cache", "cache"]),
        Trainer("ours, projected cache", [*ours, "--cache", "projected"]),
        Trainer("ours, no cache", ours),
    ]
    if args.mlx_vlm:
        found.append(Trainer("mlx-vlm", [args.mlx_vlm, "training_mlx_vlm.py"], 1.5))
    if args.unsloth:
        found.append(Trainer("Unsloth", [args.unsloth, "training_unsloth.py"], 1.2))
    return found


def race(field: list[Trainer], shape: Shape, rounds: int, title: str) -> list[str]:
    """Runs all on one subject, a step each in turn, and prints a table; goals missed."""
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder) / "subject", shape)
        try:
            for trainer in field:
                trainer.start(subject)
                trainer.step()
            for number in range(rounds):
                # Every second round in reverse, so that none always follows the same one.
                for trainer in field[:: 1 if number % 2 == 0 else -1]:
                    trainer.step()
        finally:
            for trainer in field:
                if hasattr(trainer, "process"):
                    trainer.stop()
    print(f"\n{title}")
    print(f"{'':32}{'CPU s':>8}  {'ratio to ours':24}{'peak MB':>8}  first loss")
    first, missed = field[0], []
    for trainer in field:
        ratio = median(trainer.cpu) / median(first.cpu)
        each = [a / b for a, b in zip(trainer.cpu, first.cpu, strict=True)]
        shown = f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f})"
        if trainer.goal:
            shown += f", goal {trainer.goal:g}"
            if ratio < trainer.goal:
                missed.append(f"{title}: {trainer.name} {ratio:.2f}, goal {trainer.goal:g}")
        print(
            f"  {trainer.name:30}{median(trainer.cpu):8.2f}  {shown:24}{trainer.peak:8.0f}  "
            f"{trainer.steps[0]['loss']:.5f}",
            flush=True,
        )
    return missed


def steps(args: argparse.Namespace) -> list[str]:
    """Step time of the 102.8 M trunk."""
    missed: list[str] = []
    sizes = [(378, 14), (224, 16)]
    for vocab in (32_000, 128_256):
        for image_size, patch in sizes[1:] if args.quick else sizes:
            shape = Shape(vocab, image_size=image_size, patch_size=patch)
            about = f"vocabulary {vocab:,}, {shape.visual} visual + {shape.text} tokens, batch 4"
            field = trainers(args, True)
            missed += race(field, shape, args.rounds, about)
            cached, _, plain, *peers = field
            if median(cached.cpu) > 1.02 * median(plain.cpu):
                missed.append(f"{about}: slower with a cache than without")
            for peer in peers:
                if peer.name == "Unsloth" and cached.peak > peer.peak:
                    missed.append(f"{about}: more memory than Unsloth")
            shares(cached, plain, shape, args)
            text = replace(shape, pictures=False, text=shape.visual + shape.text)
            about = f"vocabulary {vocab:,}, {text.text} text tokens, batch 4"
            missed += race(trainers(args, False), text, args.rounds, about)
    return missed


def shares(cached: Trainer, plain: Trainer, shape: Shape, args: argparse.Namespace) -> None:
    """What a step would cost without the cache, the head at supervised positions, batching."""
    whole = Trainer("", [sys.executable, "training_ours.py", "--cache", "cache", "--whole-head"])
    one = Trainer("", [sys.executable, "training_ours.py", "--cache", "cache"])
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder) / "subject", shape)
        for trainer, batch in ((whole, shape.batch), (one, 1)):
            replace(shape, batch=batch).save(subject)
            trainer.start(subject)
            for _ in range(3):
                trainer.step()
            trainer.stop()
    step = median(cached.cpu)
    waited = [s["waited"] / s["wall"] for s in cached.steps[1:]]
    print(
        f"  shares: cache {median(plain.cpu) / step:.2f}x, logits at supervised positions "
        f"{median(whole.cpu) / step:.2f}x, a batch of {shape.batch} instead of ones "
        f"{shape.batch * median(one.cpu) / step:.2f}x; waited for data "
        f"{100 * max(waited):.2f}% of a step at most",
        flush=True,
    )


def memory(args: argparse.Namespace) -> list[str]:
    """Peak memory: goals are 0.6 of mlx-vlm's and mlx-lm's, and no more than Unsloth's."""
    missed: list[str] = []
    long = Shape(128_256, text=295, supervised=64, batch=1, rows=1)
    toy = Shape(
        128_256,
        image_size=224,
        text=165,
        supervised=100,
        batch=2,
        rows=2,
        width=512,
        layers=8,
        heads=8,
        kv_heads=8,
        ffn=1376,
        keys="q_proj,v_proj",
    )
    for checkpoint in (False, True):
        note = ", gradient checkpointing" if checkpoint else ""
        about = f"vocabulary 128,256, 1,024 tokens, 64 supervised{note}"
        shape = replace(long, grad_checkpoint=checkpoint)
        missed += weigh([t for t in trainers(args, True) if t.name != "Unsloth"], shape, about, 0.6)
        text = replace(shape, pictures=False, text=1024)
        missed += weigh(trainers(args, False), text, about + ", text", 0.6)
        if args.unsloth:
            field = [t for t in trainers(args, True) if t.name != "mlx-vlm"]
            about = f"toy of 8 x 512, batch 2 x 421, 200 supervised{note}"
            missed += weigh(field, replace(toy, grad_checkpoint=checkpoint), about, 1.0)
    return missed


def weigh(field: list[Trainer], shape: Shape, title: str, goal: float) -> list[str]:
    """Peak memory of all, each alone, as a share of the last one's."""
    print(f"\n{title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder) / "subject", shape)
        for trainer in field:
            trainer.start(subject)
            for _ in range(2):  # the second has the optimizer's state from its start
                trainer.step()
            trainer.stop()
    peer = field[-1]
    for trainer in field:
        print(
            f"  {trainer.name:30}{trainer.peak:8.0f} MB  {trainer.peak / peer.peak:.2f} of "
            f"{peer.name}'s  {median(trainer.cpu):7.2f} CPU s  first loss "
            f"{trainer.steps[0]['loss']:.5f}",
            flush=True,
        )
    share = field[0].peak / peer.peak
    if peer.name.startswith("ours") or share <= goal:
        return []
    return [f"{title}: {share:.2f} of {peer.name}'s memory, goal {goal:g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Every figure of training.")
    parser.add_argument("--quick", action="store_true", help="196 visual tokens only, two rounds")
    parser.add_argument("--rounds", type=int, default=0, help="timed steps of each trainer")
    parser.add_argument("--only", default="steps,memory", help="steps, memory or both")
    parser.add_argument("--mlx-vlm", default=os.environ.get("MLX_VLM_PYTHON", ""))
    parser.add_argument("--unsloth", default=os.environ.get("UNSLOTH_PYTHON", ""))
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    print(EQUAL)
    missed: list[str] = []
    for name, part in (("steps", steps), ("memory", memory)):
        if name in args.only.split(","):
            missed += part(args)
    if missed:
        sys.exit("\nover or under their goals:\n" + "\n".join(missed))
    print("\nall goals met")


if __name__ == "__main__":
    main()
