"""Inference beside its peers: preprocessing, the vision tower, prefill and decode.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/inference.py \\
        --mlx-vlm PYTHON [--only pictures,tower,language] [--pairs 15] [--json]

--mlx-vlm (or MLX_VLM_PYTHON) names the interpreter of an environment with mlx-vlm 0.7.10 and
transformers 5, without torchvision; mlx-lm is in ours. Pictures and tower run in a process for ours
and one for the peers, fed the same files; ours and mlx-lm decode in one process.

    pictures   640 x 480 JPEG files to normalised 384 x 384 pixels on the device
    tower      SigLIP-So400m's widths, of 27 layers as many as --tower-layers, one view
    language   a Llama; from a prompt's tokens to the first token (prefill), and on (decode)

Figures are CPU seconds of one thread, which other work on the machine moves least. Contenders take
turns, the order reversed every second time; a ratio is the median of the pairs' own, with the
interval that holds the true median in 95 of 100 runs (order statistics of the pairs). A goal is
met where that interval reaches it, and missed where it ends below.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from inference_subject import Sizes, make

HERE = Path(__file__).resolve().parent
PARTS = ("pictures", "tower", "language")
# How many times as fast as the peer; issue of the figures: (part, figure, peer) -> goal.
GOALS = {
    ("pictures", "cpu", "mlx-vlm"): 2.0,
    ("pictures", "cpu", "transformers"): 1.5,
    ("tower", "cpu", "mlx-vlm"): 1.0,
    ("language", "prefill", "mlx-lm"): 1.0,
    ("language", "decode", "mlx-lm"): 0.98,
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# The largest difference of pixels, and of features a tower's layer, that rounding explains.
SAME_PIXELS, SAME_FEATURES = 2e-7, 1e-4


class Process:
    """A process of contenders, which answers each name with the figures of a turn."""

    def __init__(self, python: str, script: str, subject: Path, task: str):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(subject), task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | ONE_THREAD,
        )
        self.contenders: list[str] = self._read()["ready"]

    def turn(self, name: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace")[-2000:]
        sys.exit(f"{' '.join(map(str, self.process.args))} ended early:\n{tail}")  # type: ignore[arg-type]


def race(part: str, subject: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figures of each contender's turns."""
    processes = [Process(sys.executable, "inference_ours.py", subject, part)]
    try:
        if part != "language":
            processes.append(Process(args.mlx_vlm, "inference_peer.py", subject, part))
        field = [(name, process) for process in processes for name in process.contenders]
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in field}
        for number in range(args.pairs):
            for name, process in field[:: 1 if number % 2 == 0 else -1]:
                turns[name].append(process.turn(name))
    finally:
        for process in processes:
            process.close()
    return turns


def compare(part: str, turns: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the table: each peer's figure over ours."""
    rows = []
    for (where, figure, peer), goal in GOALS.items():
        if where != part:
            continue
        for ours in (name for name in turns if name.startswith("ours")):
            own = [turn[figure] for turn in turns[ours]]
            other = [turn[figure] for turn in turns[peer]]
            ratios = sorted(b / a for a, b in zip(own, other, strict=True))
            low, high = interval(ratios)
            rows.append(
                {
                    "part": part if figure == "cpu" else figure,
                    "ours": ours,
                    "peer": peer,
                    "ours_cpu_s": median(own),
                    "peer_cpu_s": median(other),
                    "ratio": median(ratios),
                    "low": low,
                    "high": high,
                    "goal": goal,
                    "met": high >= goal and median(ratios) >= goal - (high - low) / 2,
                }
            )
    return rows


def interval(ratios: list[float]) -> tuple[float, float]:
    """The median's 95% interval: the sign test's, of sorted values."""
    n = len(ratios)
    out, tail = 0, 0.0
    while out < n // 2 and tail + math.comb(n, out) / 2**n <= 0.025:
        tail += math.comb(n, out) / 2**n
        out += 1
    at = max(out - 1, 0)
    return ratios[at], ratios[n - 1 - at]


def agree(part: str, subject: Path, turns: dict[str, list[dict[str, Any]]], layers: int) -> str:
    """What the contenders' results differ by; exits where they did not do the same work."""
    if part == "language":
        ours, theirs = turns["ours"][0]["tokens"], turns["mlx-lm"][0]["tokens"]
        if ours != theirs:
            sys.exit(f"ours and mlx-lm answered otherwise: {ours} and {theirs}")
        return f"{len(ours)} equal tokens"
    kind, limit = ("pixels", SAME_PIXELS) if part == "pictures" else ("features", SAME_FEATURES)
    ours = np.load(subject / f"{kind}-ours.npy")
    notes = []
    for path in sorted(subject.glob(f"{kind}-*.npy")):
        name = path.stem.removeprefix(kind + "-")
        if name == "ours":
            continue
        theirs = np.load(path)
        theirs = theirs.transpose(0, 2, 3, 1) if theirs.shape[1:2] == (3,) else theirs
        off = float(np.abs(ours - theirs).max())
        notes.append(f"{off:.1e} from {name}'s")
        if off > limit * (layers if kind == "features" else 1):
            sys.exit(f"{kind} of ours and {name} differ by {off}")
    return f"{kind} at most " + ", ".join(notes)


def main() -> None:
    args = parse()
    sizes = Sizes(
        args.pictures,
        tower_layers=args.tower_layers,
        width=args.width,
        layers=args.layers,
        vocab=args.vocab,
        prompt=args.prompt,
        answer=args.answer,
    )
    rows: list[dict[str, Any]] = []
    notes = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder) / "subject", sizes)
        view = np.random.default_rng(1).integers(0, 256, (sizes.image_size,) * 2 + (3,), np.uint8)
        np.save(subject / "view.npy", view)
        for part in args.only:
            turns = race(part, subject, args)
            rows += compare(part, turns)
            notes[part] = agree(part, subject, turns, sizes.tower_layers)
    missed = [row for row in rows if not row["met"]]
    if args.json:
        print(json.dumps({"pairs": args.pairs, "rows": rows, "notes": notes}))
    else:
        show(rows, notes, args.pairs)
    sys.exit(bool(missed))


def show(rows: list[dict[str, Any]], notes: dict[str, str], pairs: int) -> None:
    print(
        f"{'':10}{'ours':14}{'CPU s':>8}  {'peer':14}{'CPU s':>8}  peer / ours, {pairs} pairs",
    )
    for row in rows:
        print(
            f"{row['part']:10}{row['ours']:14}{row['ours_cpu_s']:8.3f}  {row['peer']:14}"
            f"{row['peer_cpu_s']:8.3f}  {row['ratio']:.3f} ({row['low']:.3f} to "
            f"{row['high']:.3f}), goal {row['goal']:g}: {'met' if row['met'] else 'missed'}"
        )
    for part, note in notes.items():
        print(f"{part}: {note}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlx-vlm", default=os.environ.get("MLX_VLM_PYTHON"), metavar="PYTHON")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--tower-layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: must be one of {', '.join(PARTS)}")
    if {"pictures", "tower"} & {*args.only}:
        if not args.mlx_vlm:
            parser.error(
                "--mlx-vlm is missing: name the python of an environment with mlx-vlm and "
                "transformers, or use --only language"
            )
        if shutil.which(args.mlx_vlm) is None:
            parser.error(f"--mlx-vlm {args.mlx_vlm}: no such interpreter")
        check = "import mlx_vlm, transformers"
        if subprocess.run([args.mlx_vlm, "-c", check], capture_output=True).returncode:
            parser.error(f"--mlx-vlm {args.mlx_vlm}: mlx-vlm or transformers is missing there")
    return args


if __name__ == "__main__":
    main()
