"""loss.png: a run's losses as a picture, where matplotlib is installed (the extra `plot`)."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

LOSS = "loss.png"
# How much of the smoothed line is its past.
SMOOTHING = 0.95


def draw(metrics: Path) -> Path | None:
    """Draws metrics.jsonl beside it; None without matplotlib, or before there is anything."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    trained = [(x["step"], x["loss"]) for x in lines if x["loss"] is not None]
    if not trained:
        return None
    figure = figures.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot([step for step, _ in trained], _smooth(trained), color="tab:blue", label="training")
    if validated := [(x["step"], x["val_loss"]) for x in lines if x.get("val_loss") is not None]:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", label="validation")
    for number, step in enumerate(x["step"] for x in lines if "skipped" in x):
        label = None if number else "step skipped"
        axes.axvline(step, color="tab:red", linewidth=0.8, linestyle=":", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per supervised token")
    axes.legend()
    path = metrics.with_name(LOSS)
    beside = path.with_name(LOSS + ".partial")
    figure.savefig(beside, format="png")
    os.replace(beside, path)
    return path


def _smooth(points: list[tuple[int, float]]) -> list[float]:
    """Exponential mean without the pull of a made-up start."""
    found, mean, weight = [], 0.0, 0.0
    for _, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append(mean / weight)
    return found
