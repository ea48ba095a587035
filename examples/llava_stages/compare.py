"""How many held-out questions a model answers right, by the place that they ask for.

python -m examples.llava_stages.compare DIR --model DIR/sft [--resize crop]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlxvlm
from mlxvlm.weights.load import load

from .rows import PLACES


def asks(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(place, question, answer) of a row's turns, each to be asked alone."""
    turns = row["messages"]
    return [
        (next(p for p in PLACES if p in ask["content"]), ask["content"], said["content"])
        for ask, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--resize", default="", choices=("squash", "crop", "pad"))
    options = parser.parse_args()
    vlm = load(options.model, resize=options.resize)
    lines = (options.folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = [(place, answer) for row in rows for place, _, answer in asks(row)]
    questions = [
        ([{"role": "user", "content": question}], [options.folder / row["image"]])
        for row in rows
        for _, question, _ in asks(row)
    ]
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for number, reply in vlm.batch(questions, max_tokens=16):
        place, answer = wanted[number]
        asked[place] += 1
        if not isinstance(reply, mlxvlm.VLMError):
            right[place] += reply.text.strip() == answer
    for place in PLACES:
        print(f"{place:<8}{right[place]:>4} of {asked[place]}")


if __name__ == "__main__":
    main()
