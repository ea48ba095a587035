"""One turn at a time: a contender of the inference benchmark waits for its name on a line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

# A contender: does its work once, and returns figures to report; "cpu" is filled in if missing.
Turn = Callable[[], dict[str, Any]]


def serve(contenders: dict[str, Turn]) -> None:
    """Answers each name on standard input with the figures of one turn, after a warm-up each."""
    for turn in contenders.values():
        turn()
    print(json.dumps({"ready": sorted(contenders)}), flush=True)
    for line in sys.stdin:
        started = time.process_time()
        figures = contenders[line.strip()]()
        figures = {"cpu": time.process_time() - started} | figures
        print(json.dumps(figures), flush=True)
