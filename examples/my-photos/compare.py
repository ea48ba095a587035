"""What a model says to held-out rows, without and with adapters, beside what was wanted.

python examples/my-photos/compare.py DIR --adapter-path DIR/lora [--model weights/demo]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mlxvlm  # noqa: E402


def answers(folder: Path, rows: list[dict[str, Any]], model: str, adapter: str | None) -> list[str]:
    vlm = mlxvlm.load(model, adapter=adapter)
    return [
        vlm.generate(one["messages"][:1], images=[folder / one["image"]], max_tokens=80).text
        for one in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter-path", required=True)
    parser.add_argument("--model", default=str(ROOT / "weights" / "demo"))
    parser.add_argument("--show", type=int, default=3)
    options = parser.parse_args()
    lines = (options.folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = [one["messages"][1]["content"] for one in rows]
    before = answers(options.folder, rows, options.model, None)
    after = answers(options.folder, rows, options.model, options.adapter_path)
    for at in range(min(options.show, len(rows))):
        print(rows[at]["image"], f"  wanted  {wanted[at]}", sep="\n")
        print(f"  before  {before[at].strip()}", f"  after   {after[at].strip()}", sep="\n")
    for name, found in (("before", before), ("after", after)):
        right = sum(f.strip() == w for f, w in zip(found, wanted, strict=True))
        print(f"{name}: {right} of {len(rows)} captions are right to the letter")


if __name__ == "__main__":
    main()
