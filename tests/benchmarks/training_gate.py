"""How the benchmark's driver paces trainers in other processes, so that their steps take turns.

A trainer's own loop runs unchanged. Only its batches pass a gate: it opens when the driver says
"step", and closes when the loop asks for the next batch, with the step done and its values known.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx


class Gate:
    """The trainer's end. Whatever the trainer prints goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.loss: float | None = None
        self.more: dict[str, Any] = {}
        self._began: tuple[float, float] | None = None

    def opens(self) -> None:
        """Waits for the next "step"; whatever else comes ends the process.

        Meanwhile it holds no memory that it does not need, because the others want it.
        """
        mx.clear_cache()
        self._tell("ready", {})
        if sys.stdin.readline().strip() != "step":
            self._out.flush()
            os._exit(0)
        self._began = (time.perf_counter(), time.process_time())

    def closes(self) -> None:
        """Tells what the step took: wall and CPU seconds, peak memory, loss."""
        assert self._began is not None
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._tell(
            "step",
            {
                "wall": wall,
                "cpu": cpu,
                "loss": self.loss,
                "peak": mx.get_peak_memory(),
                "rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                **self.more,
            },
        )

    def paced(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, each behind the gate; preparing one counts as part of its step."""
        while True:
            self.opens()
            yield next(batches)
            self.closes()

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        self._out.write(json.dumps({"kind": kind, **values}) + "\n")
        self._out.flush()
