"""Progress of long commands, on stderr."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

SAMPLE = ("question", "answer", "wanted")
WHY = {"not finite": "not finite", "spike": "far above those before"}
# Seconds between two looks of the live line.
LIVE_S = 0.2


class LiveLine:
    """One line on stderr that rewrites itself; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self.on = sys.stderr.isatty()
        self.width = 0

    def show(self, text: str) -> None:
        if not self.on:
            return
        # A line that wraps could not be taken back.
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + text.ljust(self.width))
        sys.stderr.flush()
        self.width = len(text)

    def clear(self) -> None:
        """Makes room for another line."""
        if self.width:
            sys.stderr.write("\r" + " " * self.width + "\r")
            self.width = 0

    def end(self) -> None:
        """Leaves what it shows, and the cursor below."""
        if self.width:
            say("")
            self.width = 0


class Progress:
    """Shows what a run reports: on a terminal one live line, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.line = LiveLine()
        self.shown = 0.0

    def training(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            self._step(values)
            return
        if kind == "done":
            self.line.end()
            list_skipped(values["failed_pictures"])
            return
        self.line.clear()
        if kind == "download":
            say(values["what"])
        elif kind == "data":
            say(f"{values['data']}: {values['rows']:,} rows")
            if len(values["sources"]) > 1:
                for name, rows, usable, used in values["sources"]:
                    say(f"  {name}: {used:,} an epoch, of {usable:,} usable in {rows:,}")
            list_skipped([(one.where, one.reason) for one in values["skipped"]], values["counts"])
            if values["batching"]:
                say(_batching(**values["batching"]))
        elif kind == "split":
            say(f"{values['held']:,} of them held back for validation")
        elif kind == "eval":
            best = "  the best so far" if values["best"] else ""
            say(f"step {values['step']:,}  validation loss {values['val_loss']:.4f}{best}")
        elif kind == "sample":
            say("  {} -> {} (wanted: {})".format(*(brief(values[k]) for k in SAMPLE)))
        elif kind == "checkpoint":
            say(f"step {values['step']:,}  saved {values['path']}")

    def end(self) -> None:
        self.line.end()

    def _step(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if "skipped" in values:
            self.line.clear()
            say(f"step {values['step']:,}  skipped: its gradients are {WHY[values['skipped']]}")
        if self.line.on and (now - self.shown > LIVE_S or values["due"]):
            self.line.show(step_line(values))
            self.shown = now
        elif not self.line.on and values["due"]:
            say(step_line(values))


def step_line(values: dict[str, Any]) -> str:
    """Step, losses, speeds, memory and time left, on one line."""
    seconds = max(values["seconds"], 1e-9)
    rate, learnt = values["tokens"] / seconds, values["supervised_tokens"] / seconds
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    others = "".join(
        f"  {name[:-5]} {value:.3f}"
        for name, value in values.items()
        if name.endswith("_loss") and name != "val_loss"
    )
    return (
        f"step {values['step']:,}/{values['steps']:,}  loss {loss}{others}"
        f"  lr {values['lr']:.2e}  {rate:,.0f} tok/s ({learnt:,.0f} supervised)"
        f"  {values['peak_memory_gb']:.1f} GB"
        f"  {duration(values['left_s'])} left"
    )


def brief(text: str, most: int = 60) -> str:
    """A text in quotes on one line; of a longer one its end, where questions have their point."""
    flat = " ".join(text.split())
    return json.dumps(flat if len(flat) <= most else "..." + flat[-most:], ensure_ascii=False)


def _batching(
    kind: str,
    padding: float,
    buckets_padding: float,
    lines: int,
    length: int,
    rows: float,
    why: str,
) -> str:
    """How rows meet, in a line."""
    if kind == "buckets":
        return f"  in buckets of like length: {padding:.1%} padding{why and '; ' + why}"
    return (
        f"  packed: {lines:,} line{'s' if lines > 1 else ''} of {length:,} tokens a micro-batch, "
        f"{rows:.1f} rows on average, {padding:.1%} padding (buckets: {buckets_padding:.1%})"
    )


def list_skipped(
    skipped: list[tuple[str, str]],
    counts: dict[str, int] | None = None,
    most: int = 5,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Names the first few rows that were left out, and counts the others; counts: by their kind."""
    tell = tell or say
    if not skipped:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in (counts or {}).items())
    tell(f"left out {len(skipped):,}{f' ({kinds})' if kinds else ''}:")
    for where, reason in skipped[:most]:
        tell(f"  {where}: {reason}")
    if len(skipped) > most:
        tell(f"  ... and {len(skipped) - most:,} more")


def duration(seconds: float) -> str:
    """3 s, 2 min, 4.5 h, 12 days."""
    if 0 < seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
