"""What a Mac runs on."""

from __future__ import annotations

import re

from .macos import ask


def warning() -> str | None:
    """What to tell someone who starts a long run on battery; None on mains, or not on a Mac."""
    done = ask("/usr/bin/pmset", "-g", "batt")
    if done is None or "Battery Power" not in done.stdout:
        return None
    left = re.search(r"(\d+)%", done.stdout)
    return (
        f"this Mac runs on its battery{f' ({left[1]}%)' if left else ''}, which is slower and will "
        "not last: plug it in."
    )


def low_power() -> str | None:
    """What to tell someone whose Mac is in its Low Power Mode; None otherwise."""
    done = ask("/usr/bin/pmset", "-g")
    if done is None or not re.search(r"\blowpowermode\s+1\b", done.stdout):
        return None
    return "Low Power Mode is on, which slows the GPU: turn it off in System Settings, Battery."
