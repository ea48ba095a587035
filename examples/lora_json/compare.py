"""What a model answers about held-out pictures, without and with adapters.

    python -m examples.lora_json.compare DIR --adapter-path DIR/lora [--model weights/demo]

An answer as JSON is right if it is an object that says just what was wanted; an ordinary answer, if
it is the right one to the letter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlxvlm
from examples.lora_json import forms

DEMO = Path(__file__).resolve().parents[2] / "weights" / "demo"
MAX_TOKENS = 250


def answers(folder: Path, rows: list[dict[str, Any]], model: str, adapter: str | None) -> list[str]:
    vlm = mlxvlm.load(model, adapter=adapter)
    found = []
    for one in rows:
        reply = vlm.generate(
            one["messages"][:1], images=[folder / one["image"]], max_tokens=MAX_TOKENS
        )
        found.append(reply.text.strip())
    return found


def score(rows: list[dict[str, Any]], said: list[str]) -> dict[str, dict[str, int]]:
    """By form: how many were asked, how many replies are JSON, how many are right."""
    found: dict[str, dict[str, int]] = {}
    for one, text in zip(rows, said, strict=True):
        counts = found.setdefault(one["form"], {"asked": 0, "parsed": 0, "right": 0})
        wanted = one["messages"][1]["content"]
        as_json = one["form"].startswith("json")
        counts["asked"] += 1
        counts["parsed"] += as_json and forms.parse(text) is not None
        counts["right"] += forms.right(text, wanted) if as_json else text == wanted
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter-path", required=True)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--show", type=int, default=4)
    options = parser.parse_args()
    lines = (options.folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    before = answers(options.folder, rows, options.model, None)
    after = answers(options.folder, rows, options.model, options.adapter_path)
    for one, old, new in list(zip(rows, before, after, strict=True))[: options.show]:
        user, wanted = (message["content"] for message in one["messages"])
        print(f"{one['image']}: {user}")
        print(f"  wanted  {wanted}\n  before  {old}\n  after   {new}")
    first, then = score(rows, before), score(rows, after)
    print(f"{'':22}{'asked':>7}{'JSON before':>13}{'after':>7}{'right before':>14}{'after':>7}")
    for form, was in first.items():
        now = then[form]
        parsed = (was["parsed"], now["parsed"]) if form.startswith("json") else ("", "")
        print(f"{form:22}{was['asked']:>7}{parsed[0]:>13}{parsed[1]:>7}", end="")
        print(f"{was['right']:>14}{now['right']:>7}")


if __name__ == "__main__":
    main()
