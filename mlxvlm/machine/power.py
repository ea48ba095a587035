"""What a Mac runs on."""

from __future__ import annotations

import re
import subprocess
import sys


def warning() -> str | None:
    """What to tell someone who starts a long run on battery; None on mains, or not on a Mac."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/bin/pmset", "-g", "batt"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Battery Power" not in done.stdout:
        return None
    left = re.search(r"(\d+)%", done.stdout)
    return (
        f"this Mac runs on its battery{f' ({left[1]}%)' if left else ''}, which is slower and will "
        "not last: plug it in."
    )
