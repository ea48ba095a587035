"""Time Machine: what can be computed again need not be backed up, and a cache is large."""

from __future__ import annotations

import sys
from pathlib import Path

from .macos import ask


def exclude(folder: Path) -> bool:
    """Keeps a folder, made if need be, out of Time Machine; whether it is. Only on a Mac.

    The mark is on the folder itself and goes where it goes.
    """
    if sys.platform != "darwin":
        return False
    folder.mkdir(parents=True, exist_ok=True)
    # A backup that takes longer is no reason not to run.
    done = ask("/usr/bin/tmutil", "addexclusion", str(folder), timeout=20)
    return done is not None and done.returncode == 0
