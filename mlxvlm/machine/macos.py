"""What the tools that come with macOS say."""

from __future__ import annotations

import subprocess
import sys


def ask(*command: str, timeout: float = 10) -> subprocess.CompletedProcess[str] | None:
    """Runs a tool; None where this is no Mac, or the tool cannot run or takes longer (seconds)."""
    if sys.platform != "darwin":
        return None
    try:
        return subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
