"""captions.csv (file_name, text) to rows for training, and a few that are held out to look at.

    python examples/my-photos/rows.py DIR [--question "Write my caption."] [--held-out 50]

Writes DIR/train.jsonl and DIR/held-out.jsonl. Every row asks the same question, so that the habit
is tied to it: other questions are answered as before.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any


def row(name: str, question: str, text: str) -> dict[str, Any]:
    user = {"role": "user", "content": question}
    return {"image": name, "messages": [user, {"role": "assistant", "content": text}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--question", default="Write my caption.")
    parser.add_argument("--held-out", type=int, default=50)
    options = parser.parse_args()
    with (options.folder / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        table = [(line["file_name"], line["text"].strip()) for line in csv.DictReader(file)]
    if len(table) <= options.held_out:
        parser.error(f"{len(table)} captions are too few to hold {options.held_out} out.")
    cut = len(table) - options.held_out
    for name, part in (("train", table[:cut]), ("held-out", table[cut:])):
        lines = [json.dumps(row(file, options.question, text)) for file, text in part]
        (options.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
