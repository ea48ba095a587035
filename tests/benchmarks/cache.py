"""Every figure of the embedding cache in one run, each by a script of its own in this folder.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/cache.py \\
        [--quick] [--shapes DIR]

codecs   bytes, errors and rates of each codec beside MLX's own, and of reading
memory   what a run's memory grows by from the 1,000th to the 100,000th row
idle     the encoder's idle time, and a run's wall time beside encoding and decoding alone
feed     how long a training step waits for a cache
study    projectors trained on each codec's features (--shapes: what `examples.shapes.run` wrote)

Half an hour on a quiet machine; --quick takes a few minutes, for figures that are only rough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHOLE = {
    "codecs": [],
    "memory": [],
    "idle": ["--pictures", "400"],
    "feed": [],
}
QUICK = {
    "codecs": ["--views", "8"],
    "memory": ["--rows", "5000"],
    "idle": ["--pictures", "32", "--image-size", "112"],
    "feed": ["--pictures", "16", "--steps", "6"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every figure of the embedding cache.")
    parser.add_argument("--quick", action="store_true", help="small sizes, rough figures")
    parser.add_argument("--shapes", type=Path, help="a folder of examples.shapes.run")
    args = parser.parse_args()
    runs = dict(QUICK if args.quick else WHOLE)
    if args.shapes:
        data = args.shapes / "data"
        runs["codecs"] = [*runs["codecs"], "--encoder", str(args.shapes / "encoder")]
        runs["codecs"] += ["--images", str(data / "images")]
        runs["study"] = ["--model", str(args.shapes / "pretrain"), "--images", str(data / "images")]
        runs["study"] += ["--data", str(data / "pretrain.jsonl"), "--val", str(data / "val.jsonl")]
        if args.quick:
            runs["study"] += ["--seeds", "1", "--iters", "10"]
    failed = []
    # This checkout is what is measured, installed or not.
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    for name, flags in runs.items():
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, str(HERE / f"cache_{name}.py"), *flags]
        if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed, or over their goals: {', '.join(failed)}")


if __name__ == "__main__":
    main()
