"""Time Machine: what can be computed again need not be backed up, and a cache is large."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def exclude(folder: Path) -> bool:
    """Keeps a folder, made if need be, out of Time Machine; whether it is. Only on a Mac.

    The mark is on the folder itself and goes where it goes.
    """
    if sys.platform != "darwin":
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return _run("addexclusion", str(folder))


def _run(*words: str) -> bool:
    try:
        done = subprocess.run(
            ["/usr/bin/tmutil", *words], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False  # a backup that takes longer is no reason not to run
    return done.returncode == 0
